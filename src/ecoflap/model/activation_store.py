"""Stores block inputs between two blocks: on their device, in the computer's memory, or in a memory-mapped file."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecoflap.errors import InvalidOption
from ecoflap.support.files import storage

OFFLOADS = ("none", "cpu", "disk")
_PAGE = mmap.ALLOCATIONGRANULARITY


def offload_kind(value: bool | str) -> str:
    """One of ``OFFLOADS``; True means "cpu" and False "none". Raises InvalidOption for anything else."""
    kind = ("none", "cpu")[value] if isinstance(value, bool) else value
    if kind not in OFFLOADS:
        raise InvalidOption(f"offload_activations must be none, cpu or disk, not {value!r}")
    return kind


class _Kept(Protocol):
    def tensor(self) -> Tensor:
        """The tensor, on the device that it came from."""
        ...


class _InMemory:
    """A tensor in the computer's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._device, self._tensor = tensor.device, tensor.cpu()

    def tensor(self) -> Tensor:
        return self._tensor.to(self._device)


class _Mapping(mmap.mmap):
    """A private view of a part of the file; the part is not written again while the view is in use."""

    part: _OnDisk


class _OnDisk:
    """A contiguous tensor in a part of the file; the part is freed when nothing refers to it."""

    def __init__(self, file: _ScratchFile, tensor: Tensor) -> None:
        self._file, self._device = file, tensor.device
        self._dtype, self._shape = tensor.dtype, tensor.shape
        data = memoryview(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._size = data.nbytes
        self._offset = file.write(data)

    def tensor(self) -> Tensor:
        mapping = _Mapping(self._file.number, self._size, access=mmap.ACCESS_COPY, offset=self._offset)
        mapping.part = self
        return torch.frombuffer(mapping, dtype=self._dtype).view(self._shape).to(self._device)

    def __del__(self) -> None:
        if hasattr(self, "_offset"):
            self._file.release(self._offset, self._size)


class _ScratchFile:
    """A file without a name, which the system removes when the process ends; freed parts are reused."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with this
        self._free: dict[int, list[int]] = {}
        self._end = 0

    @property
    def number(self) -> int:
        return self._file.fileno()

    def write(self, data: memoryview) -> int:
        """Write ``data`` and return its offset. Raises StorageError if there is no space."""
        if free := self._free.get(len(data)):
            offset = free.pop()
        else:
            offset = self._end
            self._end += -(-len(data) // _PAGE) * _PAGE
        done = 0
        with storage(self._folder):
            self._file.seek(offset)
            while done < len(data):
                done += os.write(self.number, data[done:])
        return offset

    def release(self, offset: int, size: int) -> None:
        self._free.setdefault(size, []).append(offset)


class Offload:
    """Stores the tensors of a tree of arguments, and returns them later.

    Args:
        kind: one of ``OFFLOADS``. "disk" stores large contiguous tensors in a file; the others stay in memory.
        folder: of the file; None: the system's folder for temporary files.
    """

    def __init__(self, kind: str = "none", folder: Path | None = None) -> None:
        self.kind = kind
        self._file = _ScratchFile(folder or Path(tempfile.gettempdir())) if kind == "disk" else None

    def keep(self, tree: Any) -> Any:
        """The tree with a reference instead of every tensor, for :meth:`use`; for "none" the tree itself."""
        return tree if self.kind == "none" else pytree.tree_map_only(Tensor, self._put, tree)

    def use(self, tree: Any) -> Any:
        """The stored tree, with every tensor on its device."""
        return tree if self.kind == "none" else pytree.tree_map_only((_InMemory, _OnDisk), _tensor, tree)

    def _put(self, tensor: Tensor) -> _Kept:
        if self._file is None or not tensor.is_contiguous() or tensor.nbytes < _PAGE:
            return _InMemory(tensor)
        return _OnDisk(self._file, tensor)


def _tensor(kept: _Kept) -> Tensor:
    return kept.tensor()
