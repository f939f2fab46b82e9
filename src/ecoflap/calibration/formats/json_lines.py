"""JSON lines: one object a line, byte offsets indexed once; compressed files are read through once for each draw."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from ecoflap.calibration.formats.compression import open_binary
from ecoflap.calibration.formats.json_file import SHOWN, columns_of, parsed
from ecoflap.calibration.images import BrokenSample
from ecoflap.calibration.tables import ClassNames, Row, Taken
from ecoflap.errors import CalibrationError


class JsonLinesTable:
    """A file of one JSON object a line; lines are parsed when asked for."""

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
    """The same in a compressed file (C4's ``.json.gz``), which has no random access: every take reads it through.

    Attributes:
        row_bytes: mean length of a line, so that a reader can take what it needs at once.
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
