"""Rows of local data files without loading them whole: parquet, JSON lines, JSON, CSV, and datasets saved to disk."""

from __future__ import annotations

import bisect
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ecoflap.errors import CalibrationError

Row = dict[str, Any]


class Table(Protocol):
    """A data set: its columns, and rows in any order that is asked for."""

    source: str
    columns: list[str]
    folder: Path | None  # where relative image paths start

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        """The rows ``indices`` in that order, with at least ``columns``."""


class ParquetTable:
    """One or several parquet files; only the row groups and columns that hold wanted rows are read."""

    def __init__(self, files: Sequence[Path], source: str) -> None:
        import pyarrow.parquet as pq

        self.source = source
        self.folder: Path | None = files[0].parent
        try:
            self._files = [pq.ParquetFile(file) for file in files]
        except Exception as error:
            raise CalibrationError(f"{source} is not a readable parquet file: {_first_line(error)}") from error
        self.columns = list(self._files[0].schema_arrow.names)
        self._groups = [(file, g) for file in self._files for g in range(file.metadata.num_row_groups)]
        self._starts = [0]
        for file, group in self._groups:
            self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        by_group: dict[int, list[int]] = {}
        for index in indices:
            by_group.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(index)
        rows: dict[int, Row] = {}
        for number, wanted in sorted(by_group.items()):
            file, group = self._groups[number]
            try:
                block = file.read_row_group(group, columns=list(columns))
            except Exception as error:
                raise CalibrationError(
                    f"{self.source} cannot be read at row {wanted[0]}: {_first_line(error)}"
                ) from error
            for index, row in zip(
                wanted, block.take([i - self._starts[number] for i in wanted]).to_pylist(), strict=True
            ):
                rows[index] = row
        return (rows[index] for index in indices)


class JsonLinesTable:
    """A file of one JSON object a line; byte offsets are indexed once, lines are parsed when asked for."""

    def __init__(self, file: Path, source: str) -> None:
        self.source, self._file = source, file
        self.folder: Path | None = file.parent
        self._offsets: list[int] = []
        with file.open("rb") as stream:
            position = 0
            for line in stream:
                if line.strip():
                    self._offsets.append(position)
                position += len(line)
        first = next(self.take([0], []), {}) if self._offsets else {}
        self.columns = list(first)

    def __len__(self) -> int:
        return len(self._offsets)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        with self._file.open("rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                try:
                    row = json.loads(stream.readline())
                except ValueError as error:
                    raise CalibrationError(f"{self.source}: sample {index} is not valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise CalibrationError(
                        f"{self.source}: sample {index} is a {type(row).__name__}, not a JSON object"
                    )
                yield row


class RowTable:
    """Rows that are already in memory (JSON, CSV)."""

    def __init__(self, rows: Sequence[Row], source: str, folder: Path | None) -> None:
        self.source, self.folder, self._rows = source, folder, rows
        self.columns = list(dict.fromkeys(key for row in rows[:100] for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        return (self._rows[index] for index in indices)


class ArrowTable:
    """A ``datasets.Dataset``, memory-mapped; images stay encoded until a sample is drawn."""

    def __init__(self, dataset: Any, source: str, folder: Path | None) -> None:
        from datasets import Image

        for name, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(name, Image(decode=False))
        self.source, self.folder, self._dataset = source, folder, dataset
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        narrow = self._dataset.select_columns([c for c in columns if c in self.columns]) if columns else self._dataset
        return (narrow[int(index)] for index in indices)


def read_json(file: Path, source: str) -> RowTable:
    """A JSON file: a list of objects, or an object with exactly one such list in it ("annotations", "data")."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise CalibrationError(f"{source} is not valid JSON: {error}") from None
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise CalibrationError(f"{source} must hold a list of objects, one a sample")
    return RowTable(data, source, file.parent)


def read_csv(file: Path, source: str) -> RowTable:
    """A CSV (or .tsv) file with a header line; all values are text."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows: list[Row] = list(csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{source} is not a readable CSV file in UTF-8: {error}") from None
    for row in rows:
        row.pop(None, None)  # type: ignore[call-overload]  # DictReader files surplus fields under None
    return RowTable(rows, source, file.parent)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
