"""Keeps the inputs that the layers of one block receive in the dense model while the block is pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ecoflap.model.activation_store import Offload
from ecoflap.model.parts import Layer


class DenseInputs:
    """Inputs of a block's layers, by call of the block and by call of the layer in it.

    Layers that receive the same tensor share one copy. Experts of a mixture are left out: in the pruned model their
    router sends them other tokens.

    Args:
        store: where tensors are kept.
    """

    def __init__(self, store: Offload) -> None:
        self._store = store
        self._kept: dict[tuple[int, str, int], Any] = {}
        self._in_call: list[tuple[Tensor, Any]] = []
        self._times: Counter[str] = Counter()
        self._call = 0

    def begin(self, call: int) -> None:
        """Begin the call of the block with this number, in the dense model or in the pruned one."""
        self._call = call
        self._times.clear()
        self._in_call.clear()

    def note(self, layer: Layer, x: Tensor) -> None:
        """Keep the input ``x`` of ``layer`` in the dense model."""
        if layer.expert:
            return
        kept = next((kept for tensor, kept in self._in_call if tensor is x), None)
        if kept is None:
            kept = self._store.keep(x.detach().clone())  # a copy: the block may write into x later
            self._in_call.append((x, kept))
        self._kept[self._next(layer)] = kept

    def of(self, layer: Layer, x: Tensor) -> Tensor | None:
        """The input of ``layer`` in the dense model for its input ``x`` in the pruned one; None if it is unknown."""
        kept = self._kept.get(self._next(layer))
        dense = None if kept is None else self._store.use(kept)
        return dense if dense is not None and dense.shape == x.shape else None

    def forget(self, layers: Iterable[Layer]) -> None:
        """Free the inputs of these layers."""
        names = {layer.name for layer in layers}
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] not in names}

    def _next(self, layer: Layer) -> tuple[int, str, int]:
        self._times[layer.name] += 1
        return self._call, layer.name, self._times[layer.name]
