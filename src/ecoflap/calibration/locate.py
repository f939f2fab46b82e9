"""Finds out what a calibration source is (file, folder, tars, hub data set) and opens it as a table or a text."""

from __future__ import annotations

from pathlib import Path

from ecoflap.calibration.formats import ACCEPTED, open_file
from ecoflap.calibration.formats.folder import open_folder
from ecoflap.calibration.formats.hub import Address, HubStream
from ecoflap.calibration.formats.place import Place
from ecoflap.calibration.formats.text import TextFiles
from ecoflap.calibration.formats.webdataset import expand, open_tars
from ecoflap.calibration.tables import Table
from ecoflap.errors import CalibrationError

__all__ = ["HubStream", "TextFiles", "open_source"]


def open_source(source: str | Path) -> Table | TextFiles | HubStream:
    """Open a calibration or test source: a path, ``path:split``, a brace pattern of tars, or the id of a hub data set.

    Raises:
        CalibrationError: it does not exist, is empty, cannot be read, or is of no known format.
    """
    text = str(source)
    place = _local(text)
    if place is not None:
        opened: Table | TextFiles = open_folder(place) if place.path.is_dir() else open_file(place)
    elif "{" in text:
        opened = open_tars([Path(name).expanduser() for name in expand(text)], text)
    elif (address := Address.parse(text)) is not None and _may_be_hub(text):
        return HubStream(address, text)
    else:
        raise CalibrationError(f"no file or folder '{source}': check the path ({ACCEPTED})")
    if len(opened) == 0:
        raise CalibrationError(f"{source} is empty: it holds no samples")
    return opened


def _local(text: str) -> Place | None:
    """The file or folder that ``text`` names, with a split after a colon if there is one."""
    path = Path(text).expanduser()
    if path.exists():
        return Place(path, text)
    name, colon, split = text.rpartition(":")
    if colon and split and Path(name).expanduser().exists():
        return Place(Path(name).expanduser(), text, split)
    return None


def _may_be_hub(text: str) -> bool:
    """Whether ``text`` looks more like an id than like a path with a mistake in it."""
    name = Path(text.partition(":")[0])
    return not Path(name.parts[0]).exists() and not name.suffix[1:].isalpha()
