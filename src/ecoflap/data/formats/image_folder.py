"""Reads folders of images: with captions in text files beside them, with one sub-folder per class, or only images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ecoflap.data.formats import imagenet
from ecoflap.data.formats.place import Place, no_splits
from ecoflap.data.images import SUFFIXES, BrokenSample
from ecoflap.data.tables import ClassNames, Row, Table, Taken
from ecoflap.errors import CalibrationError
from ecoflap.support.reading import MOST_LINES, NO_READING, read_bytes, reason_of

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")
FEW = 5  # folders that may be beside the only one with images
DEEPEST = 4  # levels of sub-folders that are searched


class CaptionedImages:
    """Images, each with a text file of the same name beside it that holds its caption; read when drawn."""

    def __init__(self, images: Sequence[str], folder: Path, source: str) -> None:
        self.source, self._images, self._root = source, images, folder
        self.folder: Path | None = folder
        self.class_names: ClassNames = {}
        self.columns = ["image", "caption"]

    def __len__(self) -> int:
        return len(self._images)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        for index in indices:
            name = self._images[index]
            try:
                text = read_bytes((self._root / name).with_suffix(".txt"), MOST_LINES)
            except FileNotFoundError:
                yield BrokenSample(f"'{name}' has no .txt with its caption beside it")
            except NO_READING as error:
                yield BrokenSample(f"the .txt with the caption of '{name}' can't be read ({reason_of(error, 'text')})")
            else:
                yield {"image": name, "caption": text.decode("utf-8-sig", errors="replace").strip()}


class ImageFiles:
    """Images by path, with their classes if known: ``classes[numbers[i]]`` is the class of ``images[i]``."""

    def __init__(
        self, images: Sequence[str], folder: Path, source: str, numbers: Sequence[int] = (), classes: Sequence[str] = ()
    ) -> None:
        self.source, self._images, self._numbers, self._classes = source, images, numbers, classes
        self.folder: Path | None = folder
        self.class_names: ClassNames = {"label": classes} if classes else {}
        self.columns = ["image", "label"] if classes else ["image"]

    def __len__(self) -> int:
        return len(self._images)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        for index in indices:
            row: Row = {"image": self._images[index]}
            if self._classes:
                row["label"] = self._classes[self._numbers[index]]
            yield row


def open_images(place: Place) -> Table | None:
    """A folder of images, with or without labels; None if it has none within a few levels.

    Raises:
        CalibrationError: no such split.
    """
    path = place.path
    here, below = _listing(path)
    while not any(map(_is_image, here)) and (only := _only(below)) is not None:  # 101_ObjectCategories/
        path = only
        here, below = _listing(path)
    splits = [folder for folder in below if folder.name.lower() in SPLITS]
    if splits and not any(map(_is_image, here)) and all(holds_images(folder) for folder in splits):
        path = _split(splits, place)
        here, below = _listing(path)
    else:
        no_splits(place)
    images = [file for file in here if _is_image(file)]
    captioned = _captioned(path, below) if not images else any((path / i).with_suffix(".txt").exists() for i in images)
    if captioned:
        return CaptionedImages(_all_images(path), path, place.source)
    if images:
        numbers, names = imagenet.labels_of(path, images) or ((), ())
        return ImageFiles(images, path, place.source, numbers, names)
    return _classes(path, below, place.source)


def _classes(path: Path, folders: Sequence[Path], source: str) -> Table | None:
    """One class a folder; all images below it are of that class."""
    found = {folder.name: _all_images(folder) for folder in folders}
    names = [name for name, images in found.items() if images]
    if not names:
        return None
    images = [f"{name}/{image}" for name in names for image in found[name]]
    numbers = [number for number, name in enumerate(names) for _ in found[name]]
    return ImageFiles(images, path, source, numbers, imagenet.readable(path, names))


def _only(folders: Sequence[Path]) -> Path | None:
    """The only one of a few folders that has images, if it is no split."""
    if len(folders) > FEW:
        return None
    holding = [folder for folder in folders if holds_images(folder)]
    return holding[0] if len(holding) == 1 and holding[0].name.lower() not in SPLITS else None


def _split(folders: Sequence[Path], place: Place) -> Path:
    wanted = place.split or "train"
    near = [folder for folder in folders if folder.name.lower() == wanted.lower()]
    near = near or [folder for folder in folders if folder.name.lower().startswith(wanted.lower())]
    if near:
        return near[0]
    names = ", ".join(folder.name for folder in folders)
    if place.split is None and len(folders) == 1:
        return folders[0]
    raise CalibrationError(f"{place.source} has no folder '{wanted}': give one of {names} after a colon")


def _captioned(path: Path, folders: Iterable[Path]) -> bool:
    """Whether there are captions beside the images in the first sub-folder with images."""
    for folder in folders:
        names, _ = _listing(folder)
        images = [name for name in names if _is_image(name)]
        if images:
            return any((folder / image).with_suffix(".txt").exists() for image in images)
    return False


def holds_images(folder: Path, depth: int = DEEPEST) -> bool:
    """Whether there are images in ``folder`` or a few levels below."""
    names, below = _listing(folder)
    return any(map(_is_image, names)) or (depth > 0 and any(holds_images(f, depth - 1) for f in below))


def _all_images(folder: Path, depth: int = DEEPEST) -> list[str]:
    """Paths of the images in and below ``folder``, relative to it, sorted within each folder."""
    names, below = _listing(folder)
    found = [name for name in names if _is_image(name)]
    if depth > 0:
        found += [f"{sub.name}/{name}" for sub in below for name in _all_images(sub, depth - 1)]
    return found


def _listing(folder: Path) -> tuple[list[str], list[Path]]:
    """Names of the files and the sub-folders of ``folder``, sorted, without hidden ones."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith((".", "__")):
                if entry.is_dir():
                    folders.append(Path(entry.path))
                else:
                    files.append(entry.name)
    return sorted(files), sorted(folders)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
