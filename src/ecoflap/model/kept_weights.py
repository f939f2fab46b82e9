"""Keeps a copy of the dense weights, so that a model can be pruned again from the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ecoflap.support.files import write_tensors


class KeptWeights:
    """A copy of some parameters, in memory or in a file.

    Args:
        model: in the state to restore.
        names: of the parameters.
        path: a safetensors file for the copy; None keeps it in memory, on the CPU.

    Raises:
        StorageError: the file can't be written.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], path: Path | None = None) -> None:
        self._model, self._names, self._path = model, tuple(names), path
        self._kept: dict[str, Tensor] = {}
        if path is None:
            # On the CPU: a copy on the GPU would take memory that the work needs.
            self._kept = {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}
        else:
            write_tensors(path, {name: model.get_parameter(name) for name in names})

    def restore(self) -> None:
        """Restore the parameters, bit for bit."""
        from safetensors import safe_open

        with torch.no_grad():
            if self._path is None:
                for name in self._names:
                    self._model.get_parameter(name).copy_(self._kept[name])
                return
            with safe_open(self._path, framework="pt") as file:
                for name in self._names:
                    self._model.get_parameter(name).copy_(file.get_tensor(name))
