"""Recognises the kind of a calibration or test source (file, folder, tars, hub data set) and opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ecoflap.data.formats import ACCEPTED, open_file
from ecoflap.data.formats.folder import open_folder
from ecoflap.data.formats.hub import Address, HubStream
from ecoflap.data.formats.place import Place
from ecoflap.data.formats.text import TextFiles
from ecoflap.data.formats.webdataset import expand, open_tars
from ecoflap.data.tables import Table
from ecoflap.errors import CalibrationError
from ecoflap.support.text import first_line

# Errors of readers on a file that does not have their format.
_SURPRISES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, StopIteration)


@contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """Context that turns a reader's errors into CalibrationError with a message of one line."""
    try:
        yield
    except OSError as error:
        named = f" ({error.filename})" if error.filename and str(error.filename) != str(source) else ""
        raise CalibrationError(f"{source} can't be read{named}: {error.strerror or error}") from error
    except _SURPRISES as error:
        raise CalibrationError(
            f"{source} does not have the format that it seems to have ({type(error).__name__}: {first_line(error)})"
        ) from error


def open_source(source: str | Path) -> Table | TextFiles | HubStream:
    """Open a calibration or test source: a path, ``path:split``, a brace pattern of tars, or the id of a hub data set.

    Raises:
        CalibrationError: it does not exist, is empty, cannot be read, or is of no known format.
    """
    with readable(source):
        return _opened(source)


def _opened(source: str | Path) -> Table | TextFiles | HubStream:
    text = str(source)
    place = _local(text)
    if place is not None:
        opened: Table | TextFiles = open_folder(place) if place.path.is_dir() else open_file(place)
    elif "{" in text:
        opened = open_tars([Path(name).expanduser() for name in expand(text)], text)
    elif (address := Address.parse(text)) is not None and _may_be_hub(text):
        return HubStream(address, text)
    else:
        raise _no_such_source(source)
    if len(opened) == 0:
        raise CalibrationError(f"{source} is empty: it holds no samples")
    return opened


def check_source(source: str | Path | None, image_folder: str | Path | None = None) -> None:
    """Check that a source exists, before a model is loaded; its content is checked when it is opened.

    Raises:
        CalibrationError: it is no file, folder or id of a hub data set; or the image folder does not exist.
    """
    with readable("the calibration or test data"):
        _check_source(source)
        checked_folder(image_folder)


def _check_source(source: str | Path | None) -> None:
    text = str(source)
    place = None if source is None else _local(text)
    if place is not None and not (place.path.is_file() or place.path.is_dir()):
        raise CalibrationError(f"{source} is no file and no folder, but a pipe or a device: give a file")
    if source is not None and place is None and "{" not in text:
        address = Address.parse(text)
        if address is None or not _may_be_hub(text):
            raise _no_such_source(source)


def _no_such_source(source: str | Path) -> CalibrationError:
    return CalibrationError(f"no file or folder '{source}': check the path ({ACCEPTED})")


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
    """Whether ``text`` looks more like an id than like a mistyped path."""
    name = Path(text.partition(":")[0])
    return not Path(name.parts[0]).exists() and not name.suffix[1:].isalpha()


def checked_folder(folder: str | Path | None) -> Path | None:
    """The image folder, if one is given. Raises CalibrationError if it does not exist."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CalibrationError(f"the image folder {path} is not there")
    return path
