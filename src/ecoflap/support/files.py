"""Writes files atomically: a reader finds the old content or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption, StorageError
from ecoflap.support.reading import checked, json_value, read_text

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"  # suffix of temporary files; a killed process may leave one
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_SEAL, _SEALED = "sha256", "data"
_log = logging.getLogger("ecoflap")


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Context that turns system errors of writing to ``path`` (disk full, no permission) into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror or error}{_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in _FULL:
        return "; free some space"
    if error.errno in _FORBIDDEN:
        return "; choose another --output, or change the permissions"
    return "; choose another --output"


def check_can_make(path: Path) -> None:
    """Raises StorageError if nothing can be written at ``path``: a parent is a file, or has no write permission."""
    above = next(folder for folder in path.expanduser().absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise StorageError(f"can't write {path}: {above} is no folder: choose another --output")
    if not path.exists() and not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"can't write {path}: no permission to write in {above}: choose another --output")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, and rename it into place.

    Raises:
        StorageError: the file could not be written; ``path`` is unchanged.
    """
    with storage(path):
        if (path.exists() and not path.is_file()) or path.parent.resolve() == Path(os.devnull).parent:
            # A file would replace it, for example /dev/null.
            raise StorageError(f"{path} is a folder, a device or a pipe, not a regular file: choose another --output")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, default_mode())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises StorageError if the disk of ``folder`` has less than ``needed`` bytes free; ``what`` needs them."""
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StorageError(
                f"{what} needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: "
                "free some space, or choose another --output"
            )


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def json_text(data: Any) -> str:
    """JSON with an indent of 1, as in :func:`write_json`. Raises ValueError for NaN and infinities."""
    return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Atomically write :func:`json_text`."""
    write_text(path, json_text(data))


def write_sealed(path: Path, data: Any) -> None:
    """Atomically write JSON with its digest, for files that must not be edited; :func:`read_sealed` checks it."""
    write_json(path, {_SEAL: _digest(data), _SEALED: data})


def read_sealed(path: Path, kind: Any = Any) -> Any | None:
    """Read what :func:`write_sealed` wrote; None if there is no file or, with a warning, if it is damaged.

    Args:
        kind: type of the content, as for :func:`ecoflap.support.reading.checked`; another type counts as damaged.
    """
    if not path.exists():
        return None
    try:
        found = json_value(read_text(path))
        if found[_SEAL] == _digest(found[_SEALED]):
            return checked(found[_SEALED], kind, str(path))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InvalidOption):
        pass
    _log.warning("%s is damaged: its content is computed again", path)
    return None


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Atomically write a safetensors file of ``tensors``, which may be on any device."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, dict(metadata or {})))
    except SafetensorError as error:  # safetensors' class for system errors
        raise StorageError(f"can't write {path}: {error}; free some space") from error


def default_mode() -> int:
    """The permissions of a new file by the process's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
