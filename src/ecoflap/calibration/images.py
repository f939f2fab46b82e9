"""Decodes the pictures of a data set from whatever a row holds: PIL image, bytes, or a path beside the data file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

ORIENTATION = 0x0112  # EXIF tag; cameras store turned pictures, and datasets' own decoder turns them back too


class BrokenSample(Exception):
    """One row cannot be used; the message says why. Counted and skipped by the reader, never shown alone."""


def decode(value: Any, folder: Path | None) -> Image.Image:
    """The picture of one row in RGB.

    Args:
        value: a PIL image, ``bytes``, a path, or the ``{"bytes", "path"}`` record of a ``datasets`` image column.
        folder: where relative paths start (the data file's folder); None where there is none.

    Raises:
        BrokenSample: missing, not a picture, or an address on the network (never fetched).
    """
    if value is None or value == "":
        raise BrokenSample("the image is missing")
    try:
        return _rgb(_open(value, folder))
    except BrokenSample:
        raise
    except FileNotFoundError as error:
        raise BrokenSample(f"no image file '{error.filename}'") from None
    except Exception as error:  # Pillow's decoders raise many unrelated types on broken bytes
        raise BrokenSample(f"unreadable image ({type(error).__name__})") from error


def _open(value: Any, folder: Path | None) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(bytes(value)))
    if isinstance(value, dict):
        return _open(value["bytes"], folder) if value.get("bytes") else _open(value.get("path") or "", folder)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _open(value[0], folder)
    if isinstance(value, (str, Path)) and str(value):
        if "://" in str(value):
            raise BrokenSample("the image is an address on the network, and those are not fetched")
        path = Path(value).expanduser()
        return Image.open(path if path.is_absolute() or folder is None else folder / path)
    raise BrokenSample(f"an image column holds {type(value).__name__}, not an image, bytes or a path")


def _rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(ORIENTATION):
        image = ImageOps.exif_transpose(image)
    converted = image.convert("RGB")  # decodes in full, so that a truncated file fails here and not in a batch
    return converted
