"""Stores pruned blocks: the protocol of a run's journal, and files for an offloaded model without a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ecoflap.errors import StorageError
from ecoflap.model.offload import remove_together_with, temporary_folder


@dataclass(frozen=True)
class PrunedBlock:
    """A pruned block: the weights of its layers by parameter name, and the layers that no calibration token reached.

    A round of a global criterion has this form, too, with packed masks of all layers instead of weights.
    """

    weights: Mapping[str, Tensor]
    unreached: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)


class BlockJournal(Protocol):
    """Saves pruned blocks one by one, so that an interrupted walk can be resumed."""

    @property
    def folder(self) -> Path | None:
        """Folder for block inputs on disk; None: the system's folder for temporary files."""

    def load(self, block: str) -> PrunedBlock | None:
        """The block if it has been pruned already."""

    def save(self, block: str, pruned: PrunedBlock) -> None: ...

    def place(self, block: str) -> Path | None:
        """The safetensors file of a saved block, from which an offloaded model reads it; None if nothing is kept."""


class NoJournal:
    """Keeps nothing."""

    folder: Path | None = None

    def load(self, block: str) -> PrunedBlock | None:
        return None

    def save(self, block: str, pruned: PrunedBlock) -> None:
        pass

    def place(self, block: str) -> Path | None:
        return None


class SpilledBlocks:
    """A journal for offloaded models without a run: keeps the pruned weights, but no walk resumes from it."""

    def __init__(self, model: nn.Module) -> None:
        folder = temporary_folder()
        self.folder = folder.path
        remove_together_with(model, folder)

    def place(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def load(self, block: str) -> PrunedBlock | None:
        return None

    def save(self, block: str, pruned: PrunedBlock) -> None:
        """Write the block's file. Raises StorageError if there is no space."""
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in pruned.weights.items()}
        try:
            save_file(tensors, self.place(block))
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"can't write {self.place(block)}: {error}; free some space, or set TMPDIR to a folder with more"
            ) from error
