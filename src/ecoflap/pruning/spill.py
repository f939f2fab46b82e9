"""Pruned blocks of an offloaded model that has no run directory: files that live as long as the model."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ecoflap.errors import StorageError
from ecoflap.network.offload import removed_with, temporary_folder
from ecoflap.pruning.walk import PrunedBlock


class SpilledBlocks:
    """A journal that keeps what the model itself can't hold, and that no later walk goes on from."""

    def __init__(self, model: nn.Module) -> None:
        self.folder = temporary_folder()
        removed_with(model, self.folder)

    def place(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def load(self, block: str) -> PrunedBlock | None:
        return None

    def save(self, block: str, pruned: PrunedBlock) -> None:
        """Raises StorageError where there is no room."""
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in pruned.weights.items()}
        try:
            save_file(tensors, self.place(block))
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"can't write {self.place(block)}: {error}; free some space, or set TMPDIR to a folder with more"
            ) from error
