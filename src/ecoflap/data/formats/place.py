"""Describes where a data set is (path and split), with helpers for files that several readers use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecoflap.errors import CalibrationError

HEAD_BYTES = 65_536  # read from a file to recognise its format


@dataclass(frozen=True)
class Place:
    """A local file or folder.

    Attributes:
        source: as the user gave it, for messages.
        split: the requested part; None if the user named none.
    """

    path: Path
    source: str
    split: str | None = None

    def at(self, path: Path) -> Place:
        """A file in this folder, of the same split; messages are about that file."""
        return Place(path, str(path), self.split)


def head(file: Path, size: int = HEAD_BYTES) -> bytes:
    """The first ``size`` bytes of a file."""
    with file.open("rb") as stream:
        return stream.read(size)


def first_text_line(file: Path) -> str:
    """The first line of a text file, cut at :data:`HEAD_BYTES`."""
    return head(file).decode("utf-8-sig", errors="replace").partition("\n")[0].rstrip("\r")


def of_split(files: Sequence[Path], place: Place, what: str) -> Path:
    """The one of several files that is named after the split, or after "train" if none was given.

    Raises:
        CalibrationError: none or several are.
    """
    names = ", ".join(file.name for file in files)
    if place.split is not None:
        files = [file for file in files if place.split in file.stem]
        if not files:
            raise CalibrationError(f"{place.source}: no {what} of split '{place.split}': there is {names}")
    elif len(files) > 1:
        files = [file for file in files if "train" in file.stem]
    if len(files) != 1:
        raise CalibrationError(
            f"{place.source} holds several {what} ({names}): give one of the files, or a split after a colon"
        )
    return files[0]


def no_splits(place: Place) -> None:
    """Raises CalibrationError if a split is requested: the data has none."""
    if place.split is not None:
        raise CalibrationError(f"{place.source}: {place.path} has no splits: leave out ':{place.split}'")
