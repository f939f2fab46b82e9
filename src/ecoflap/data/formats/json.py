"""Reads JSON documents and JSON lines of any size: indexes the byte offsets of the objects once, parses one when drawn.

Compressed files can't be indexed: they are read completely for each draw.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ecoflap.data.formats.text import open_binary
from ecoflap.data.images import BrokenSample
from ecoflap.data.tables import ClassNames, Row, Taken
from ecoflap.errors import CalibrationError
from ecoflap.support.reading import NO_READING, json_value, reason_of
from ecoflap.support.text import whole_characters

# Brackets, and strings, which may contain brackets. A string matches in only one way, so there is no backtracking.
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
SHOWN = 100  # objects whose keys become the columns


class Objects:
    """Objects of a JSON file by number: the elements of one list, or the values of one object with their keys."""

    def __init__(self, file: Path, source: str) -> None:
        self.source = source
        self._file = file
        self._starts, self._ends = array("Q"), array("Q")
        self.keys: list[str] = []

    def add(self, start: int, end: int, key: str | None = None) -> None:
        self._starts.append(start)
        self._ends.append(end)
        if key is not None:
            self.keys.append(key)

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: Sequence[int]) -> Taken:
        """The objects ``indices``, in that order."""
        with self._file.open("rb") as stream:
            for index in indices:
                stream.seek(self._starts[index])
                yield parsed(stream.read(self._ends[index] - self._starts[index]), index)

    def __iter__(self) -> Iterator[Row]:
        """All objects; raises CalibrationError at one that is not valid."""
        for row in self.take(range(len(self))):
            if isinstance(row, BrokenSample):
                raise CalibrationError(f"{self.source}: {row}")
            yield row


class JsonDocument:
    """The top level of a JSON file.

    Attributes:
        kind: ``list``, ``object``, or ``lines`` if a second value follows the first (JSON lines).
        lists: for an object, its lists of objects by key; for a list of objects, itself under "".
        members: for an object, its values that are objects, with their keys.
        texts: for an object, its values that are strings.

    Raises:
        CalibrationError: the file is not JSON or ends too early.
    """

    def __init__(self, file: Path, source: str) -> None:
        self.file, self.source = file, source
        self.kind = ""
        self.lists: dict[str, Objects] = {}
        self.members = Objects(file, source)
        self.texts: dict[str, str] = {}
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._scan(data)

    def _scan(self, data: mmap.mmap) -> None:
        depth, key, start, member, last = 0, "", 0, 0, 0
        nested = 1  # depth of the indexed objects: in the document itself, or in a list of it
        current: Objects | None = None  # the list that is being read
        for match in TOKEN.finditer(data):
            token = data[match.start()]
            if token == ord('"'):
                if depth == 1 and self.kind == "object":
                    text = _string(match.group())
                    if data[match.end() : match.end() + 16].lstrip()[:1] == b":":
                        key = text
                    else:
                        self.texts[key] = text
            elif token in b"{[":
                if depth == 0 and self.kind:
                    self.kind = "lines"
                    return
                if depth == 0:
                    self.kind, nested = ("object", 2) if token == ord("{") else ("list", 1)
                if token == ord("[") and depth == nested - 1:
                    current, last = Objects(self.file, self.source), match.end()
                elif token == ord("{") and depth == nested and current is not None:
                    self._check_gap(data[last : match.start()])
                    start = match.start()
                elif token == ord("{") and depth == 1:
                    member = match.start()
                depth += 1
            else:
                depth -= 1
                if token == ord("}") and depth == nested and current is not None:
                    current.add(start, match.end())
                    last = match.end()
                elif token == ord("}") and depth == 1:
                    self.members.add(member, match.end(), key)
                elif token == ord("]") and depth == nested - 1 and current is not None:
                    if len(current):
                        self._check_gap(data[last : match.start()])
                        self.lists[key] = current
                    current = None
        if not self.kind:
            raise CalibrationError(f"{self.source} must hold a list of objects: it has neither a list nor an object")
        if depth != 0:
            raise CalibrationError(f"{self.source} is not valid JSON: it ends too early")

    def _check_gap(self, between: bytes) -> None:
        """Check that there is only a comma between two objects of a list, and no other values."""
        if between.strip() not in (b"", b","):
            raise CalibrationError(f"{self.source} must hold a list of objects, one per sample")


class ObjectTable:
    """The objects of a JSON file as rows."""

    def __init__(self, objects: Objects, source: str, folder: Path | None) -> None:
        self.source, self.folder = source, folder
        self._objects = objects
        self.class_names: ClassNames = {}
        self.columns = columns_of(objects.take(range(min(SHOWN, len(objects)))), source)

    def __len__(self) -> int:
        return len(self._objects)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        return self._objects.take(indices)


def parsed(data: bytes | str, index: int) -> Row | BrokenSample:
    """One JSON object, or its fault."""
    try:
        row = json_value(data, finite=False)
    except NO_READING as error:
        return BrokenSample(f"sample {index} is not valid JSON ({reason_of(error, 'JSON')})")
    if b"\\ud" in data.lower() if isinstance(data, bytes) else "\\ud" in data.lower():
        row = whole_characters(row)
    if not isinstance(row, dict):
        return BrokenSample(f"sample {index} is a {type(row).__name__}, not a JSON object")
    return row


def columns_of(rows: Taken, source: str) -> list[str]:
    """Keys of the first rows; raises CalibrationError if none of them can be read."""
    found: dict[str, Any] = {}
    broken: BrokenSample | None = None
    for row in rows:
        if isinstance(row, BrokenSample):
            broken = broken or row
        else:
            found.update(row)
    if not found and broken is not None:
        raise CalibrationError(f"{source}: {broken}")
    return list(found)


def _string(token: bytes) -> str:
    try:
        return str(whole_characters(json.loads(token)))
    except ValueError:
        return token.decode("utf-8", errors="replace")


class JsonLinesTable:
    """A file with one JSON object per line; lines are parsed when they are drawn."""

    def __init__(self, file: Path, source: str) -> None:
        self.source, self._file = source, file
        self.folder: Path | None = file.parent
        self.class_names: ClassNames = {}
        self._offsets = array("Q")
        with file.open("rb") as stream:
            position = 0
            for line in stream:
                if line.strip():
                    self._offsets.append(position)
                position += len(line)
        self.columns = columns_of(self.take(range(min(SHOWN, len(self))), []), source)

    def __len__(self) -> int:
        return len(self._offsets)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        with self._file.open("rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                yield parsed(stream.readline(), index)


class CompressedLinesTable:
    """The same in a compressed file (C4's ``.json.gz``) without random access: every ``take`` reads all of it.

    Attributes:
        row_bytes: mean length of a line, so that a reader can take many rows at once.
    """

    def __init__(self, file: Path, source: str) -> None:
        self.source, self._file = source, file
        self.folder: Path | None = file.parent
        self.class_names: ClassNames = {}
        first: list[Row | BrokenSample] = []
        self._count = size = 0
        with open_binary(file, source) as stream:
            for line in stream:
                if line.strip():
                    if len(first) < SHOWN:
                        first.append(parsed(line, self._count))
                    self._count += 1
                    size += len(line)
        self.row_bytes = size // max(self._count, 1)
        self.columns = columns_of(iter(first), source)

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        wanted = set(indices)
        last = max(wanted, default=-1)
        rows: dict[int, Row | BrokenSample] = {}
        with open_binary(self._file, self.source) as stream:
            number = -1
            for line in stream:
                if not line.strip():
                    continue
                number += 1
                if number in wanted:
                    rows[number] = parsed(line, number)
                if number >= last:
                    break
        if len(rows) < len(wanted):
            raise CalibrationError(f"{self.source} has changed while it was read")
        return (rows[index] for index in indices)
