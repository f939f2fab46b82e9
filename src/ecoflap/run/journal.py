"""Keeps estimates and pruned blocks of a run as they are made, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.importance.scores import Estimate
from ecoflap.model.files import weight_bytes
from ecoflap.support.files import read_sealed, storage, write_sealed, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ecoflap.pruning.journal import PrunedBlock

_log = logging.getLogger("ecoflap")


class EstimateFile:
    """Estimates of stage 1, one JSON line each with a checksum.

    The first damaged line (cut off by a kill, zeros after a power cut) and all lines after it are dropped, and measured
    again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[Estimate] = []
        whole = 0
        for estimate, length in _lines(path):
            self._known.append(estimate)
            whole += length
        with storage(path):
            # Without a buffer, so that a failed write raises at once, and not again when the file is closed.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the stage runs
            self._file.truncate(whole)

    def estimates(self) -> Iterable[Estimate]:
        return tuple(self._known)

    def merged_with(self, others: Iterable[Path]) -> tuple[Estimate, ...]:
        """:meth:`estimates` and those in the files of other workers."""
        return (*self._known, *(estimate for path in others for estimate, _ in _lines(path)))

    def append(self, estimate: Estimate) -> None:
        """Add one line, without a buffer, so that a killed process loses nothing."""
        row = [estimate.layer, estimate.batch, estimate.draw, float(estimate.value).hex()]  # hexadecimal: every bit
        line = json.dumps([*row, _sum(row)]).encode() + b"\n"
        with storage(self._path):
            while line:
                line = line[self._file.write(line) or 0 :]

    def close(self) -> None:
        with storage(self._path), self._file:
            os.fsync(self._file.fileno())


def _lines(path: Path) -> Iterator[tuple[Estimate, int]]:
    """The estimates of a file up to the first damaged line, each with the bytes of its line."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        estimate = _read(line)
        if estimate is None:
            return
        yield estimate, len(line)


def _read(line: bytes) -> Estimate | None:
    """The estimate in a line; None if the line is damaged."""
    try:
        *row, total = json.loads(line)
        layer, batch, draw, value = row
        whole = line.endswith(b"\n") and total == _sum(row)
        return Estimate(str(layer), int(batch), int(draw), float.fromhex(value)) if whole else None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _sum(row: list[Any]) -> int:
    return zlib.crc32(json.dumps(row).encode())


class BlockFiles:
    """Pruned blocks of stage 2, one safetensors file each, with a digest of its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def bytes(self) -> int:
        """Total size of the existing files."""
        return weight_bytes(self.folder)

    def place(self, block: str) -> Path:
        """The block's file; an offloaded model reads its weights from there."""
        return self._path(block)

    def load(self, block: str) -> PrunedBlock | None:
        """The block; None if there is none or, with a warning, if its file is damaged: it is pruned again."""
        from safetensors import SafetensorError, safe_open

        from ecoflap.pruning.journal import PrunedBlock

        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            unreached = metadata.get("unreached", "")
            tokens = metadata.get("tokens", "")
            if metadata.get("sha256") == _digest(weights, unreached + tokens):
                return PrunedBlock(weights, tuple(json.loads(unreached)), json.loads(tokens or "{}"))
            reason = "it is not as it was written"
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error)
        _log.warning("%s is damaged (%s): block %s is pruned again", path, reason, block)
        return None

    def save(self, block: str, pruned: PrunedBlock) -> None:
        """Write the block's file. Raises StorageError if that fails; an earlier file is unchanged then."""
        weights = {name: weight.detach().cpu().contiguous() for name, weight in pruned.weights.items()}
        unreached = json.dumps(list(pruned.unreached))
        tokens = json.dumps(dict(pruned.tokens)) if pruned.tokens else ""
        metadata = {"unreached": unreached, "sha256": _digest(weights, unreached + tokens)}
        if tokens:
            metadata["tokens"] = tokens
        write_tensors(self._path(block), weights, metadata)


def _digest(weights: Mapping[str, Tensor], told: str) -> str:
    """SHA-256 over the metadata ``told`` and over the weights' names, dtypes, shapes and bytes."""
    import torch

    digest = hashlib.sha256(told.encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)  # a view, to save memory
    return digest.hexdigest()


class SearchFile:
    """The state of an allocation search, as one JSON file; numbers are kept to the bit."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """The state; None if there is none or, with a warning, if it is damaged: the search begins again."""
        return read_sealed(self._path)

    def save(self, state: dict[str, Any]) -> None:
        write_sealed(self._path, state)
