"""Readers of published data formats, one per file; the structure of a file or folder decides which one reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ecoflap.data.formats import coco, gqa, karpathy, nlvr2, vqa
from ecoflap.data.formats.csv import CsvTable
from ecoflap.data.formats.json import CompressedLinesTable, JsonDocument, JsonLinesTable, ObjectTable
from ecoflap.data.formats.place import Place, head, no_splits
from ecoflap.data.formats.text import COMPRESSED, TextFiles
from ecoflap.data.formats.text import SUFFIXES as TEXT_SUFFIXES
from ecoflap.data.formats.webdataset import open_tars
from ecoflap.data.registry import added_suffixes, formats
from ecoflap.data.tables import ParquetTable, Table
from ecoflap.errors import CalibrationError

Opened: TypeAlias = "Table | TextFiles"

ACCEPTED = (
    ".parquet, .jsonl, .json, .csv, .tsv, .txt, .tar, a folder of these, a folder of images (with metadata.jsonl, with "
    "captions beside them, or one folder a class), or a hub data set owner/name"
)
LINES = (".jsonl", ".ndjson", ".json")
DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", *COMPRESSED)


@dataclass(frozen=True)
class Published:
    """A format of data sets that are published as one JSON document.

    Attributes:
        name: for messages.
        patterns: of file names in a folder.
        open: gives the table, or None for a document of another format.
    """

    name: str
    patterns: tuple[str, ...]
    open: Callable[[JsonDocument, Place], Table | None]


PUBLISHED = (
    Published("VQAv2 or OK-VQA", vqa.PATTERNS, vqa.open_vqa),
    Published("COCO or NoCaps captions", coco.PATTERNS, coco.open_coco),
    Published("Karpathy splits", karpathy.PATTERNS, karpathy.open_karpathy),
    Published("GQA", gqa.PATTERNS, gqa.open_gqa),
)


def open_file(place: Place) -> Opened:
    """Open a data file.

    Raises:
        CalibrationError: it is empty, cannot be read, or is of no known format.
    """
    path = place.path
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path} is empty: it holds no samples")
    suffix = path.suffix.lower()
    for known in formats():
        if suffix in known.suffixes and (table := known.open(place)) is not None:
            return table
    if suffix in COMPRESSED:
        return _open_compressed(place)
    if suffix == ".json":
        return _open_json(place)
    no_splits(place)
    if suffix in TEXT_SUFFIXES:
        return TextFiles([path], place.source)
    if suffix == ".tar":
        return open_tars([path], place.source)
    if suffix == ".parquet":
        return ParquetTable([path], place.source)
    if suffix in LINES:
        return _adapted(JsonLinesTable(path, place.source))
    if suffix in (".csv", ".tsv"):
        return CsvTable(path, place.source)
    more = "".join(f"{suffix}, " for suffix in added_suffixes())
    raise CalibrationError(f"{path}: unknown format '{path.suffix}'; accepted are {more}{ACCEPTED}")


def _open_compressed(place: Place) -> Opened:
    no_splits(place)
    inner = place.path.with_suffix("").suffix.lower()
    if inner in LINES:
        return _adapted(CompressedLinesTable(place.path, place.source))
    if inner in TEXT_SUFFIXES:
        return TextFiles([place.path], place.source)
    raise CalibrationError(
        f"{place.path}: only JSON lines and plain text can be read compressed (.jsonl.gz, .json.gz, .txt.gz, .zst): "
        "decompress it first"
    )


def _open_json(place: Place) -> Table:
    """A JSON document of a published format, a list of objects, an object with one such list, or JSON lines."""
    document = JsonDocument(place.path, place.source)
    if document.kind == "lines":
        no_splits(place)
        return _adapted(JsonLinesTable(place.path, place.source))
    for published in PUBLISHED:
        if (table := published.open(document, place)) is not None:
            return table
    no_splits(place)
    if len(document.lists) == 1:
        return _adapted(ObjectTable(next(iter(document.lists.values())), place.source, place.path.parent))
    if document.kind == "object" and document.lists:
        raise CalibrationError(
            f"{place.source} holds several lists ({', '.join(document.lists)}) and has no known format: "
            "give a file with one list of objects, one per sample"
        )
    if document.kind == "object" and b"\n" not in head(place.path).strip():  # JSON lines with a single line
        return _adapted(JsonLinesTable(place.path, place.source))
    raise CalibrationError(f"{place.source} must hold a list of objects, one per sample")


def _adapted(table: Table) -> Table:
    """The table with usual columns, if it has one of the published formats of plain rows."""
    return nlvr2.nlvr2(table) if nlvr2.fits(table.columns) else table
