"""Reads data sets as tables: columns, and rows in any order without loading all of them."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ecoflap.data.images import BrokenSample
from ecoflap.errors import CalibrationError
from ecoflap.support.text import first_line

Row = dict[str, Any]
ClassNames = Mapping[str, Sequence[str]]  # class names by column
Taken = Iterator["Row | BrokenSample"]  # broken rows are yielded, too, to be counted and skipped
BLOCK_ROWS = 1024  # decoded at a time: equal rows take little space in a file, but not in memory
BLOCK_BYTES = 16 << 20  # decoded at a time from a parquet row group


class Table(Protocol):
    """A data set: its columns, and its rows in any order.

    Attributes:
        source: as the user gave it, for messages.
        columns: names of the columns.
        folder: base of relative image paths; None if there is none.
        class_names: for columns of class numbers, the names of the classes in the order of their numbers; for columns
            of names, all names. Empty if the data set does not have them.
    """

    source: str
    columns: list[str]
    folder: Path | None
    class_names: ClassNames

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        """The rows ``indices`` in that order, with at least ``columns``."""


class RowTable:
    """Rows in memory, such as the annotations of a published data set."""

    def __init__(
        self,
        rows: Sequence[Row],
        source: str,
        folder: Path | None,
        class_names: ClassNames | None = None,
    ) -> None:
        self.source, self.folder, self._rows = source, folder, rows
        self.columns = list(dict.fromkeys(key for row in rows[:100] for key in row))
        self.class_names: ClassNames = class_names or {}

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        return (self._rows[index] for index in indices)


class MappedTable:
    """Another table whose rows are changed when they are taken: ``change(row)`` has the columns ``columns``."""

    def __init__(self, table: Table, columns: Sequence[str], change: Callable[[Row], Row]) -> None:
        self.source, self.folder, self.class_names = table.source, table.folder, table.class_names
        self.columns = list(columns)
        self._table, self._change = table, change

    def __len__(self) -> int:
        return len(self._table)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        rows = self._table.take(indices, self._table.columns)
        return (row if isinstance(row, BrokenSample) else self._change(row) for row in rows)


class JoinedTable:
    """The concatenation of several tables with the same columns."""

    def __init__(self, tables: Sequence[Table], source: str) -> None:
        self.source, self._tables = source, tables
        self.folder, self.class_names = tables[0].folder, tables[0].class_names
        self.columns = list(dict.fromkeys(column for table in tables for column in table.columns))
        self._starts = [0]
        for table in tables:
            self._starts.append(self._starts[-1] + len(table))

    def __len__(self) -> int:
        return self._starts[-1]

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        by_table: dict[int, list[int]] = {}
        for index in indices:
            by_table.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(index)
        rows: dict[int, Row | BrokenSample] = {}
        for number, wanted in sorted(by_table.items()):
            local = [index - self._starts[number] for index in wanted]
            rows.update(zip(wanted, self._tables[number].take(local, columns), strict=True))
        return (rows[index] for index in indices)


class ParquetTable:
    """One or several parquet files; only row groups with wanted rows, and wanted columns, are read, block by block."""

    def __init__(self, files: Sequence[Path], source: str) -> None:
        import pyarrow.parquet as pq

        self.source = source
        self.folder: Path | None = files[0].parent
        try:
            # Without a buffer size pyarrow reads a column's whole row group into memory; some files have only one.
            self._files = [pq.ParquetFile(file, buffer_size=1 << 20) for file in files]
        except Exception as error:
            raise CalibrationError(f"{source} is not a readable parquet file: {first_line(error)}") from error
        schema = self._files[0].schema_arrow
        self.columns = list(schema.names)
        self.class_names: ClassNames = _class_names((schema.metadata or {}).get(b"huggingface"))
        self._groups = [(file, g) for file in self._files for g in range(file.metadata.num_row_groups)]
        self._starts = [0]
        for file, group in self._groups:
            self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        by_group: dict[int, list[int]] = {}
        for index in indices:
            by_group.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(index)
        rows: dict[int, Row | BrokenSample] = {}
        for number, wanted in sorted(by_group.items()):
            try:
                rows.update(self._from_group(number, sorted(set(wanted)), list(columns)))
            except Exception as error:
                raise CalibrationError(
                    f"{self.source} cannot be read at row {wanted[0]}: {first_line(error)}"
                ) from error
        return (rows[index] for index in indices)

    def _from_group(self, number: int, wanted: Sequence[int], columns: list[str]) -> Iterator[tuple[int, Row]]:
        """The rows ``wanted`` (ascending) of one row group; one block at a time is in memory."""
        file, group = self._groups[number]
        size = file.metadata.row_group(group)
        lines = max(1, min(size.num_rows, BLOCK_ROWS, BLOCK_BYTES * size.num_rows // max(size.total_byte_size, 1)))
        start, position = self._starts[number], 0
        for block in file.iter_batches(batch_size=lines, row_groups=[group], columns=columns):
            end = position
            while end < len(wanted) and wanted[end] < start + block.num_rows:
                end += 1
            if end > position:
                for index in wanted[position:end]:  # not take(), which imports pandas
                    yield index, block.slice(index - start, 1).to_pylist()[0]
            start, position = start + block.num_rows, end
            if position == len(wanted):
                return


class ArrowTable:
    """A ``datasets.Dataset``, memory-mapped; images stay encoded until a sample is drawn."""

    def __init__(self, dataset: Any, source: str, folder: Path | None) -> None:
        self.source, self.folder = source, folder
        self.class_names: ClassNames
        self._dataset, self.class_names = undecoded(dataset)
        self.columns = list(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        narrow = self._dataset.select_columns([c for c in columns if c in self.columns]) if columns else self._dataset
        return (narrow[int(index)] for index in indices)


def undecoded(dataset: Any) -> tuple[Any, dict[str, list[str]]]:
    """A data set (or stream) of ``datasets`` whose images stay encoded, and the class names of its columns."""
    from datasets import ClassLabel, Image

    names: dict[str, list[str]] = {}
    for column, feature in (dataset.features or {}).items():
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(inner, Image):
            dataset = dataset.cast_column(column, [Image(decode=False)])
        elif isinstance(feature, ClassLabel):
            names[column] = list(feature.names)
    return dataset, names


def _class_names(metadata: bytes | None) -> dict[str, list[str]]:
    """Class names by column from the metadata that ``datasets`` writes into a parquet file."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        return {
            name: [str(n) for n in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # another program wrote the file
