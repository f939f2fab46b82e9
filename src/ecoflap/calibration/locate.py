"""Finds out what a calibration source is (file, folder, hub data set) and opens it as a table or as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ecoflap.calibration.tables import (
    ArrowTable,
    JsonLinesTable,
    ParquetTable,
    Row,
    RowTable,
    Table,
    read_csv,
    read_json,
)
from ecoflap.errors import CalibrationError

ACCEPTED = ".txt, .parquet, .jsonl, .json, .csv, .tsv, a folder of these, or an image folder with metadata.jsonl"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(:[\w.-]+)?")
SHUFFLE_BUFFER = 10_000  # samples of a streamed hub data set among which the seed chooses


class TextFiles:
    """Plain text: one document a file, in the order of the names."""

    def __init__(self, files: Sequence[Path], source: str) -> None:
        self.source = source
        self.documents: list[str] = []
        for file in files:
            try:
                self.documents.append(file.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from None
        if not any(document.strip() for document in self.documents):
            raise CalibrationError(f"{source} is empty: give a text with something in it")


class HubStream:
    """A hub data set, streamed: the first samples of a seeded shuffle, so that nothing is downloaded whole."""

    folder = None

    def __init__(self, name: str) -> None:
        import datasets

        identifier, _, split = name.partition(":")
        self.source = name
        try:
            stream = datasets.load_dataset(identifier, streaming=True)
        except Exception as error:
            raise CalibrationError(
                f"'{identifier}' is no local file or folder, and could not be opened as a hub data set "
                f"({type(error).__name__}): check the path or the id"
            ) from error
        split = split or ("train" if "train" in stream else next(iter(stream)))
        if split not in stream:
            raise CalibrationError(f"hub data set {identifier} has no split '{split}': it has {', '.join(stream)}")
        self._stream = stream[split]
        for column, feature in (self._stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                self._stream = self._stream.cast_column(column, datasets.Image(decode=False))
        self.columns: list[str] = list(self._stream.features or next(iter(self._stream)))

    def draw(self, seed: int | None) -> Iterator[tuple[int, Row]]:
        """(position in the data set, row), shuffled by ``seed``; in order when it is None."""
        numbered: Any = self._stream.map(lambda row, i: {**row, "__index__": i}, with_indices=True)
        if seed is not None:
            numbered = numbered.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return ((int(row.pop("__index__")), row) for row in islice(numbered, None))


def open_source(source: str | Path) -> Table | TextFiles | HubStream:
    """Open a calibration or test source.

    Raises:
        CalibrationError: it does not exist, is empty, cannot be read, or is of no known format.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        opened = _open_folder(path)
    elif path.exists():
        opened = _open_file(path, path.suffix.lower())
    elif HUB_ID.fullmatch(str(source)) and not path.parent.exists() and not path.suffix[1:].isalpha():
        return HubStream(str(source))
    else:
        raise CalibrationError(f"no file or folder '{source}': check the path ({ACCEPTED})")
    if not isinstance(opened, TextFiles) and len(opened) == 0:
        raise CalibrationError(f"{source} is empty: it holds no samples")
    return opened


def _open_file(path: Path, suffix: str) -> Table | TextFiles:
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path} is empty: it holds no samples")
    source = str(path)
    if suffix in (".txt", ".text", ".md"):
        return TextFiles([path], source)
    if suffix == ".parquet":
        return ParquetTable([path], source)
    if suffix in (".jsonl", ".ndjson"):
        return JsonLinesTable(path, source)
    if suffix == ".json":
        return read_json(path, source)
    if suffix in (".csv", ".tsv"):
        return read_csv(path, source)
    raise CalibrationError(f"{path}: unknown format '{path.suffix}'; accepted are {ACCEPTED}")


def _open_folder(path: Path) -> Table | TextFiles:
    source = str(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _open_saved(path, source)
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json"):
        if (path / name).exists():
            return _open_file(path / name, Path(name).suffix)
    for suffix in (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and file.is_file())
        if not files:
            continue
        if suffix == ".txt":
            return TextFiles(files, source)
        if suffix == ".parquet":
            return ParquetTable(files, source)
        if len(files) == 1:
            return _open_file(files[0], suffix)
        tables = [_open_file(file, suffix) for file in files]
        rows = [row for t in tables if not isinstance(t, TextFiles) for row in t.take(range(len(t)), t.columns)]
        return RowTable(rows, source, path)
    raise CalibrationError(f"folder {path} holds no data that is understood: {ACCEPTED}, or one saved by `datasets`")


def _open_saved(path: Path, source: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(source)
    except Exception as error:
        raise CalibrationError(
            f"{path} looks like a saved data set but cannot be read ({type(error).__name__})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise CalibrationError(f"{path} has the splits {', '.join(loaded)}: give the folder of one of them")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return ArrowTable(loaded, source, path)
