"""Small files for the tests of data formats: pictures that can be told apart, JSON, JSON lines."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pico

from ecoflap.data import Sample


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pico.picture(number).save(stream, "PNG")
    return stream.getvalue()


def pictures(folder: Path, names: Iterable[str]) -> None:
    """One picture a name (PNG data whatever the suffix, which Pillow does not mind), numbered from 0."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def shows(sample: Sample, *numbers: int) -> bool:
    """Whether the sample's pictures are those with these numbers, in that order."""
    return [image.tobytes() for image in sample.images] == [pico.picture(n).tobytes() for n in numbers]


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
