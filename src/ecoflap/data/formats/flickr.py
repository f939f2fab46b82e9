"""Reads the caption files of Flickr30k and Flickr8k: ``results_20130124.token`` and ``results.csv``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ecoflap.data.formats.place import Place, first_text_line, no_splits
from ecoflap.data.registry import Format
from ecoflap.data.tables import Row, RowTable
from ecoflap.errors import CalibrationError

TOKEN = re.compile(r"(\S+\.\w+)#(\d+)\t(.*)")  # 1000092795.jpg#0<tab>Two young guys ...
# image_name| comment_number| comment; one published line lacks the second bar
RESULTS = re.compile(r"([^|]+\.\w+)\s*\|\s*(\d+)\s*\|?\s*(.*)")
RESULTS_HEADER = "image_name|comment_number|comment"


def open_flickr(place: Place) -> RowTable | None:
    """One row an image, with all its captions; None if the file is of another kind.

    Raises:
        CalibrationError: a line is not in the format.
    """
    first = first_text_line(place.path)
    if first.replace(" ", "") == RESULTS_HEADER:
        pattern, skip = RESULTS, 1
    elif TOKEN.fullmatch(first):
        pattern, skip = TOKEN, 0
    else:
        return None
    no_splits(place)
    rows: dict[str, Row] = {}
    for image, caption in _captions(place.path, pattern, skip, place.source):
        row = rows.setdefault(image, {"image": image, "captions": [], "image_id": Path(image).stem})
        row["captions"].append(caption)
    return RowTable(list(rows.values()), place.source, place.path.parent)


FORMAT = Format((".csv", ".txt", ".token"), open_flickr)


def _captions(file: Path, pattern: re.Pattern[str], skip: int, source: str) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        for number, line in enumerate(stream):
            if number < skip or not line.strip():
                continue
            match = pattern.fullmatch(line.rstrip("\n").strip())
            if match is None:
                raise CalibrationError(f"{source}: line {number + 1} is not an image and its caption: '{line.strip()}'")
            if match[3].strip():
                yield match[1].strip(), match[3].strip()
