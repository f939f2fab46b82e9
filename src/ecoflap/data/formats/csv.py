"""Reads CSV and TSV files with a header line: indexes the records' byte offsets once, parses a record when drawn."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ecoflap.data.images import BrokenSample
from ecoflap.data.tables import ClassNames, Taken
from ecoflap.errors import CalibrationError

LARGEST_FIELD = 1 << 27  # characters; after an unclosed quote, the rest of the file would be one field
DELIMITERS = (",", ";", "\t", "|")


class CsvTable:
    """One record a row, in UTF-8; a quoted field may hold line ends. All values are text.

    The header decides the delimiter: the usual one of the file's suffix if it has one, else ``;``, tab or ``|``.
    """

    def __init__(self, file: Path, source: str) -> None:
        self.source, self._file = source, file
        self.folder: Path | None = file.parent
        self.class_names: ClassNames = {}
        self._offsets = array("Q")
        try:
            with _large_fields():
                self._index()
        except UnicodeDecodeError:
            raise CalibrationError(
                f"{source} is not a readable CSV file: it is not UTF-8 text, convert it first"
            ) from None
        except csv.Error as error:
            hint = ": is a quote not closed?" if "field larger" in str(error) else ""
            raise CalibrationError(
                f"{source} is not a readable CSV file, after row {len(self)} ({error}){hint}"
            ) from None

    def _index(self) -> None:
        with self._file.open("rb") as stream:
            lines = _Lines(stream)
            first = lines.first()
            usual = "\t" if self._file.suffix.lower() == ".tsv" else ","
            self._delimiter = next((d for d in (usual, *DELIMITERS) if d in first), usual)
            records = csv.reader(lines, delimiter=self._delimiter)
            self.columns = [name.strip() for name in next(records)]
            start = lines.position
            for record in records:  # the reader takes only the lines of one record
                if record:
                    self._offsets.append(start)
                start = lines.position

    def __len__(self) -> int:
        return len(self._offsets)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        with self._file.open("rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                with _large_fields():
                    record = next(csv.reader(_Lines(stream), delimiter=self._delimiter))
                if len(record) < len(self.columns):
                    yield BrokenSample(f"it has {len(record)} fields, the header {len(self.columns)}")
                else:
                    yield dict(zip(self.columns, record, strict=False))


@contextmanager
def _large_fields() -> Iterator[None]:
    """Context with a higher limit than the csv module's 131,072 characters: fields may hold images in base64."""
    before = csv.field_size_limit(LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Lines:
    """Lines of a binary stream as text; ``position`` is the offset of the next one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.position = stream, 0
        self._ahead: str | None = None

    def first(self) -> str:
        """The first line without byte order mark; it stays in the stream."""
        line = self._stream.readline()
        self.position = len(line)
        self._ahead = line.decode("utf-8-sig")
        return self._ahead

    def __iter__(self) -> Iterator[str]:
        if self._ahead is not None:
            line, self._ahead = self._ahead, None
            yield line
        for raw in self._stream:
            self.position += len(raw)
            yield raw.decode("utf-8")
