"""Saves a checkpoint that transformers loads with the same outputs; writes all of it or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ecoflap.errors import CheckpointError, OutputExists, StorageError
from ecoflap.model.files import quiet
from ecoflap.model.offload import is_offloaded
from ecoflap.model.replace import check_replaceable
from ecoflap.support.files import default_mode, storage
from ecoflap.support.reading import read_json
from ecoflap.support.text import first_line

if TYPE_CHECKING:
    from ecoflap.model.checkpoint import Checkpoint


def save(checkpoint: Checkpoint, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write model, configuration, generation configuration and processor into ``folder``; return it.

    Each weight keeps its dtype and its ties; weights are split into as many files as the source had. Everything is
    written into a hidden folder next to ``folder``, flushed to disk and renamed, so that ``folder`` is either as before
    or complete.

    Args:
        overwrite: replace a folder that already holds a model.

    Raises:
        OutputExists: ``folder`` is not empty and ``overwrite`` is false, or it contains more than a model.
        StorageError: disk full, no permission; nothing is left behind.
        CheckpointError: transformers refuses to save this model.
    """
    with replacing(folder, overwrite=overwrite) as partial:
        write_model(checkpoint, partial)
    return Path(folder).expanduser().absolute()


@contextmanager
def replacing(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Context with a hidden folder to write a model into; at exit it replaces ``folder``, unless something failed.

    Raises:
        OutputExists: as :func:`~ecoflap.model.replace.check_replaceable`; or another process is writing it.
        StorageError: disk full, no permission; nothing is left behind.
    """
    folder = Path(folder).expanduser().absolute()
    with storage(folder):
        check_replaceable(folder, overwrite=overwrite)
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    with ExitStack() as locks:
        locks.enter_context(_alone(partial, folder))
        with storage(folder):
            if folder.is_dir():
                locks.enter_context(_alone(folder, folder))  # its writer may still be removing the replaced folder
            check_replaceable(folder, overwrite=overwrite)  # again: another process may have made it meanwhile
        try:
            yield partial
            _flush(partial)
            _remove(old)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            _flush_entry(folder.parent)
            _remove(old)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            named = Path(str(getattr(error, "filename", None) or partial))
            if not any(named.is_relative_to(own) for own in (partial, old, folder)):
                raise CheckpointError(f"'{named}' can't be read ({reason}): nothing was written") from error
            raise StorageError(f"the model could not be written to '{folder}' ({reason}): nothing was kept") from error
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)


@contextmanager
def _alone(place: Path, folder: Path) -> Iterator[None]:
    """Context with the lock of the folder ``place``; if it is not ``folder``, it is emptied first, and removed at exit.

    Raises:
        OutputExists: another process is writing into ``folder``.
        StorageError: it can't be made.
    """
    with storage(folder):
        handle = _locked(place, make=place != folder)
    if handle is None:
        raise OutputExists(f"another process is writing '{folder}': wait for it, or choose another folder")
    try:
        if place != folder:
            with storage(folder):
                for left in place.iterdir():  # by a process that was killed
                    _remove(left)
        yield
    finally:
        if place != folder and _is_at(handle, place):
            shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _locked(place: Path, *, make: bool) -> int | None:
    """A handle that holds the folder's lock; None if another process does. Without file locks there is no check."""
    while True:
        if make:
            if place.is_file():
                place.unlink()
            place.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if make:
                continue  # the process that had it has just put it in its place
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            pass  # a file system without locks
        if _is_at(handle, place):
            return handle
        os.close(handle)


def _is_at(handle: int, place: Path) -> bool:
    """Whether the open folder still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(place))
    except OSError:
        return False


def write_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what :func:`save` writes into an empty folder; raises OSError, SafetensorError or CheckpointError."""
    model = checkpoint.model
    with quiet():
        try:
            limit = _shard_limit(model, checkpoint.shard_sizes)
            model.save_pretrained(folder, state_dict=_in_order(model), max_shard_size=limit)
            if checkpoint.processor is not None:
                checkpoint.processor.save_pretrained(folder)
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # many kinds; fast tokenizers report even a full disk as a bare Exception
            if "(os error" in str(error):
                raise OSError(first_line(error)) from error
            raise CheckpointError(f"transformers cannot save {type(model).__name__}: {first_line(error)}") from error
        finally:
            model.config.dtype = checkpoint.dtype  # see below
    # save_pretrained records the dtype of the first parameter. If a family keeps it in float32 in a half-precision
    # model, from_pretrained would load all weights in float32.
    path = folder / "config.json"
    config = read_json(path, "the configuration", CheckpointError, finite=False)
    config["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(default_mode())  # safetensors ignores the umask and makes its files private


def _in_order(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict of an offloaded model, in the order of a model in memory; None for a model in memory.

    In another order the same weights would go to other files.
    """
    if not is_offloaded(model):
        return None
    entries = model.state_dict()

    def natural(name: str) -> list[tuple[str, int]]:
        found = re.findall(r"(?:^|\.)([^.]*?)(\d*)(?=\.|$)", name)
        return [(text, int(digits or -1)) for text, digits in found]

    return {name: entries[name] for name in sorted(entries, key=natural)}


def _shard_limit(model: torch.nn.Module, source: tuple[int, ...]) -> int | str:
    """The bytes per weight file with which ``model`` is split into as many files as the source, of similar sizes."""
    if not source:
        return "50GB"
    sizes = _tensor_bytes(model)
    total = sum(sizes)
    if len(source) == 1:
        return total + 1
    likely = round(max(source) * total / sum(source))
    if _count(sizes, likely) == len(source):
        return likely
    low, high = total // len(source), total + 1
    while low < high:  # the smallest limit that needs no more files than the source has
        middle = (low + high) // 2
        if _count(sizes, middle) <= len(source):
            high = middle
        else:
            low = middle + 1
    return low


def _tensor_bytes(model: torch.nn.Module) -> list[int]:
    entries = model.state_dict(keep_vars=True).values()
    # Tied weights are stored once; an offloaded one has the same placeholder under all its names.
    tensors = {id(t) if t.is_meta else (t.device, t.data_ptr()): t for t in entries}
    return [tensor.nbytes for tensor in tensors.values()]


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights in files."""
    return sum(_tensor_bytes(model))


def _count(sizes: list[int], limit: int) -> int:
    """The number of files that transformers writes: tensors in order, a new file if the next one does not fit."""
    files, filled = 0, 0
    for size in sizes:
        if size > limit:
            files += 1  # a file of its own
        elif filled and filled + size <= limit:
            filled += size
        else:
            files, filled = files + 1, size
    return files


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    """Flush a file or folder to the disk, if the system supports it."""
    if os.name == "nt" and path.is_dir():
        return  # folders can't be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    elif folder.exists():
        folder.unlink()
