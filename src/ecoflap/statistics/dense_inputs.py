"""Keeps the inputs that the layers of one block receive in the dense model while the block is pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ecoflap.model.activation_store import Offload
from ecoflap.model.parts import Layer


class DenseInputs:
    """Inputs of a block's layers, by the call of the block and by how often it called the layer before.

    Layers that receive one tensor share what is kept of it. An expert of a mixture has none: in the pruned model the
    router sends it other tokens.

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
        """The block's call of this number begins, in the dense model or in the pruned one."""
        self._call = call
        self._times.clear()
        self._in_call.clear()

    def note(self, layer: Layer, x: Tensor) -> None:
        """``layer`` receives ``x`` in the dense model."""
        if layer.expert:
            return
        kept = next((kept for tensor, kept in self._in_call if tensor is x), None)
        if kept is None:
            kept = self._store.keep(x.detach().clone())  # the block may go on to write into its own
            self._in_call.append((x, kept))
        self._kept[self._next(layer)] = kept

    def of(self, layer: Layer, x: Tensor) -> Tensor | None:
        """What ``layer`` received in the dense model where it receives ``x`` now; None if that is not known."""
        kept = self._kept.get(self._next(layer))
        dense = None if kept is None else self._store.use(kept)
        return dense if dense is not None and dense.shape == x.shape else None

    def forget(self, layers: Iterable[Layer]) -> None:
        """These layers are done."""
        names = {layer.name for layer in layers}
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] not in names}

    def _next(self, layer: Layer) -> tuple[int, str, int]:
        self._times[layer.name] += 1
        return self._call, layer.name, self._times[layer.name]
