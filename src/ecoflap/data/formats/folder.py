"""Recognises the content of a folder: a data set saved by ``datasets``, a published data set, shards, texts, images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ecoflap.data.columns import is_file_name
from ecoflap.data.formats import ACCEPTED, DATA_SUFFIXES, PUBLISHED, Opened, imagenet, open_file
from ecoflap.data.formats.image_folder import DEEPEST, SPLITS, holds_images, open_images
from ecoflap.data.formats.place import Place, no_splits, of_split
from ecoflap.data.formats.text import COMPRESSED, TextFiles
from ecoflap.data.formats.text import SUFFIXES as TEXT_SUFFIXES
from ecoflap.data.formats.webdataset import open_tars
from ecoflap.data.images import SUFFIXES as IMAGE_SUFFIXES
from ecoflap.data.images import BrokenSample
from ecoflap.data.registry import added_suffixes
from ecoflap.data.tables import ArrowTable, JoinedTable, ParquetTable, Table, Taken
from ecoflap.errors import CalibrationError


def open_saved(place: Place) -> Table | None:
    """The data set, or the requested split ("train" by default) of several; None if it is none.

    Raises:
        CalibrationError: it cannot be read, or has no such split.
    """
    path = place.path
    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return None
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise CalibrationError(
            f"{path} looks like a saved data set but cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        no_splits(place)
        return ArrowTable(loaded, place.source, path)
    split = place.split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise CalibrationError(f"{place.source} has the splits {', '.join(loaded)}: give one of them after a colon")
    return ArrowTable(loaded[split], place.source, path)


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
FLICKR = ("results.csv", "results_*.token", "Flickr8k.token.txt", "captions.txt")
LOOKED_AT = 1000  # files of a folder that are checked for images


def open_folder(place: Place) -> Opened:
    """Open a folder of data.

    Raises:
        CalibrationError: it holds no known data, or does not have the requested split.
    """
    for attempt in (open_saved, _metadata, _published, _shards, _images, _data, _texts, open_images):
        if (opened := attempt(place)) is not None:
            return opened
    raise CalibrationError(f"folder {place.path} holds no known data: give {ACCEPTED}, or a folder saved by `datasets`")


def _metadata(place: Place) -> Opened | None:
    """The image folder of ``datasets``: a table that names the images, beside them or in each split's folder."""
    wanted = (place.split or "train").lower()
    base, first = place.path, _metadata_in(place.path)
    inner = next((one for one in _folders(place.path) if one.name.lower() == wanted), None) if first is None else None
    if inner is not None:
        base, first = inner, _metadata_in(inner)
    files, chosen = _metadata_below(base, wanted)
    if first is not None:
        opened = open_file(place.at(first) if base == place.path else Place(first, str(first)))
        if not files or isinstance(opened, TextFiles):
            return opened
        top: list[Table] = [opened]
    else:
        top = []
    tables = [open_file(Place(file, str(file))) for file in files]
    rows = [*top, *(Below(table) for table in tables if not isinstance(table, TextFiles))]
    if rows and not chosen and base == place.path:
        no_splits(place)
    return JoinedTable(rows, place.source) if rows else None


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _metadata_below(folder: Path, wanted: str, depth: int = DEEPEST) -> tuple[list[Path], bool]:
    """The metadata files of the sub-folders, a few levels deep, and whether a folder was chosen by its split.

    Folders named as splits are skipped on the first level; below it, if one of them is the wanted split (as in
    ``data/train``), only this one is used.
    """
    below, found, chosen = _folders(folder), list[Path](), False
    splits = {one for one in below if one.name.lower() in SPLITS}
    own = {one for one in splits if one.name.lower() == wanted}
    if depth == DEEPEST or own:
        chosen = depth < DEEPEST
        below = [one for one in below if one not in splits or (one in own and depth < DEEPEST)]
    for one in below:
        if (file := _metadata_in(one)) is not None:
            found.append(file)
        if depth > 1:
            more, parted = _metadata_below(one, wanted, depth - 1)
            found, chosen = found + more, chosen or parted
    return found, chosen


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(one.path) for one in islice(entries, LOOKED_AT) if _is_shown_folder(one))


def _is_shown_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


class Below:
    """A table of a sub-folder, with names of images relative to it: names of existing files become full paths."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.source, self.folder, self.class_names = table.source, table.folder, table.class_names
        self.columns = table.columns

    def __len__(self) -> int:
        return len(self._table)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        for row in self._table.take(indices, columns):
            yield (
                row if isinstance(row, BrokenSample) else {name: self._full(name, value) for name, value in row.items()}
            )

    def _full(self, column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._full(column, one) for one in value]
        if isinstance(value, str) and self.folder is not None and is_file_name(column):
            return str(self.folder / value)
        return value


def _published(place: Place) -> Opened | None:
    """Annotation files of published data sets, found by name; their structure is checked when they are opened."""
    for folder in (place.path, place.path / "annotations"):
        for published in PUBLISHED:
            files = sorted({file for pattern in published.patterns for file in folder.glob(pattern)})
            if files:
                named = any(place.split in file.stem for file in files) if place.split else True
                if len(files) == 1 and not named:  # the split is inside
                    return open_file(place.at(files[0]))
                file = of_split(files, place, f"{published.name} files")
                return open_file(Place(file, str(file)))
        found = next((file for pattern in FLICKR for file in sorted(folder.glob(pattern))), None)
        if found is not None:
            return open_file(place.at(found))
    return None


def _shards(place: Place) -> Opened | None:
    for folder in (place.path, place.path / (place.split or "train")):
        files = _files(folder, (".tar",)) if folder.is_dir() else []
        if files:
            return open_tars(_of_split(files, place) if folder == place.path else files, place.source)
    return None


def _images(place: Place) -> Opened | None:
    """Images in the folder, also by ImageNet's lists; texts beside them are captions."""
    names = [file.name for file in islice(place.path.iterdir(), LOOKED_AT)]
    lists = (*imagenet.MAPPINGS, *imagenet.SOLUTIONS)
    found = any(name in lists or name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return open_images(place) if found else None


def _data(place: Place) -> Opened | None:
    """Files of one data format, in the folder or in its ``data`` folder, as in repositories on the hub."""
    for folder in (place.path, place.path / "data"):
        for suffix in (*DATA_SUFFIXES, *added_suffixes()) if folder.is_dir() else ():
            files = _files(folder, (suffix,))
            if suffix in COMPRESSED:
                files = [file for file in files if file.with_suffix("").suffix not in TEXT_SUFFIXES]
            files = _of_split(files, place)
            if suffix == ".parquet" and files:
                return ParquetTable(files, place.source)
            if files:
                return _joined([open_file(Place(file, str(file))) for file in files], place.source)
    return None


def _joined(tables: Sequence[Opened], source: str) -> Opened:
    if len(tables) == 1:
        return tables[0]
    rows: list[Table] = [table for table in tables if not isinstance(table, TextFiles)]
    return JoinedTable(rows, source)


def _texts(place: Place) -> Opened | None:
    """Text files in the folder or its sub-folders, without README files beside class folders."""
    suffixes = (*TEXT_SUFFIXES[:2], *TEXT_SUFFIXES[3:], *(f"{t}{c}" for t in TEXT_SUFFIXES for c in COMPRESSED))
    if holds_images(place.path):
        return None
    files = _files(place.path, suffixes)
    files = files or sorted(f for f in place.path.rglob("*") if f.name.lower().endswith(suffixes) and f.is_file())
    if not files:
        return None
    no_splits(place)
    return TextFiles(files, place.source)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(suffixes) and not file.name.startswith(".") and file.is_file()
    )


def _of_split(files: Sequence[Path], place: Place) -> list[Path]:
    """Files named after the given split; by default after "train", if the names contain splits."""
    wanted = [file for file in files if file.name.startswith(place.split or "train")]
    if place.split is None:
        others = [file for file in files if file.name.startswith(("test", "val", "dev"))]
        return wanted if wanted and others else list(files)
    if files and not wanted:
        names = ", ".join(file.name for file in files[:5])
        raise CalibrationError(f"{place.source}: no file is named after the split '{place.split}': there is {names}")
    return wanted
