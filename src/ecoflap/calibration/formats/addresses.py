"""Data sets that list where pictures can be downloaded, not the pictures (CC3M, LAION): refused in one line."""

from __future__ import annotations

from collections.abc import Sequence

from ecoflap.errors import CalibrationError

ADDRESSES = ("url", "image_url", "imageurl", "image_link")
CAPTIONS = ({"caption"}, {"captions"}, {"text", "width", "height"})  # the last is LAION's
PICTURES = {"image", "img", "jpg", "jpeg", "png", "webp", "image_path", "file_name"}


def refuse_addresses(columns: Sequence[str], source: str) -> None:
    """Raises CalibrationError for columns such as (caption, url), and for CC3M's file, whose first row is the header.

    Web pages (C4, Wikipedia) have an address too, but no caption: their text is the sample.
    """
    plain = {column.lower() for column in columns}
    listed = plain & set(ADDRESSES) and any(names <= plain for names in CAPTIONS)
    if not listed and not (len(columns) == 2 and columns[1].startswith(("http://", "https://"))):
        return
    if plain & PICTURES:
        return
    raise CalibrationError(
        f"{source} lists addresses of pictures, and those are not fetched: download them first (img2dataset writes "
        "webdataset tars, which are read here), or say columns text=... to use the captions alone"
    )
