"""The journal of a run: estimates and pruned blocks, kept as they come, so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption, StorageError
from ecoflap.files import read_json, storage, write_atomically, write_json
from ecoflap.importance.scores import Estimate

if TYPE_CHECKING:
    from ecoflap.pruning.walk import PrunedBlock


class EstimateFile:
    """Estimates of stage 1, one JSON line each. A last line that was cut off by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[Estimate] = []
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                estimate = _read(line)
                if estimate is None:
                    break
                self._known.append(estimate)
                whole += len(line)
        with storage(path):
            # Without a buffer: a line that can't be written is told by its own write, and not again at closing.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the stage runs
            self._file.truncate(whole)

    def estimates(self) -> Iterable[Estimate]:
        return tuple(self._known)

    def append(self, estimate: Estimate) -> None:
        """Add one line. It reaches the system at once, so that a killed process loses nothing."""
        row = [estimate.layer, estimate.batch, estimate.draw, estimate.value.hex()]  # hexadecimal: every bit
        line = json.dumps(row).encode() + b"\n"
        with storage(self._path):
            while line:
                line = line[self._file.write(line) or 0 :]

    def close(self) -> None:
        with storage(self._path), self._file:
            os.fsync(self._file.fileno())


def _read(line: bytes) -> Estimate | None:
    """One whole line; None for anything else."""
    try:
        layer, batch, draw, value = json.loads(line)
        return Estimate(str(layer), int(batch), int(draw), float.fromhex(value)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


class BlockFiles:
    """Pruned blocks of stage 2, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, block: str) -> Path:
        return self._folder / f"{block}.safetensors"

    def load(self, block: str) -> PrunedBlock | None:
        """Raises InvalidOption for a damaged file, which no kill of ours leaves."""
        from safetensors import SafetensorError, safe_open

        from ecoflap.pruning.walk import PrunedBlock

        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                unreached = json.loads((file.metadata() or {}).get("unreached", "[]"))
                return PrunedBlock({name: file.get_tensor(name) for name in file.keys()}, tuple(unreached))  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InvalidOption(
                f"{path} is damaged ({error}): remove it, and --resume prunes the block again"
            ) from error

    def save(self, block: str, pruned: PrunedBlock) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self._path(block)
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in pruned.weights.items()}
        metadata = {"unreached": json.dumps(list(pruned.unreached))}
        try:
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
        except SafetensorError as error:  # its own name for the system's refusals
            raise StorageError(f"can't write {path}: {error}; free some space") from error


class SearchFile:
    """Where the search for an allocation stands, as one JSON file; numbers are kept to the bit."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """Raises InvalidOption for a damaged file, which no kill of ours leaves."""
        return read_json(self._path, "the search's state") if self._path.exists() else None

    def save(self, state: dict[str, Any]) -> None:
        write_json(self._path, state)
