"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.packed.columns import scaled
from ecoflap.model.packed.format import PackedWeight, unpack_weight
from ecoflap.model.packed.holder import PackedParts
from ecoflap.model.packed.ops import multiply


class PackedLinear(PackedParts):
    """y = x Wᵀ + b with a packed W of (outputs, inputs); replaces ``nn.Linear`` and transformers' Conv1D.

    The attribute ``weight`` is the dense weight, which is unpacked when an operation uses it.

    Args:
        weight: the packed matrix; for Conv1D that of Wᵀ, with ``transposed``.
        bias: (outputs,) or None.
        transposed: the replaced layer stores its weight as (inputs, outputs).
        dtype: of the dense weight, if the values are rounded.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, transposed=transposed, dtype=dtype)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._unchecked:
            self.verify("a layer on the disk")
        scales = self.scales if "scales" in self._parameters else self._none
        bias = self._none if self.bias is None else self.bias
        x = scaled(x, self._parameters.get("column_scales"))
        return multiply(x, self.compressed, self.bitmask, self.row_offsets, scales, bias, self.group_size)  # type: ignore[arg-type]

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight in the layout of the replaced layer."""
        dense = unpack_weight(self.packed(), dtype or self.dtype).detach()
        return dense.t().contiguous() if self.transposed else dense

    @property
    def weight(self) -> Tensor:
        """The dense weight, whose values are unpacked only when an operation uses them."""
        return _LazyWeight(self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._told()}"
        )


class _LazyWeight(Tensor):
    """Stands for a layer's dense weight; an operator unpacks it."""

    _layer: PackedLinear

    @staticmethod
    def __new__(cls, layer: PackedLinear) -> _LazyWeight:
        size = (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
        made: _LazyWeight = Tensor._make_wrapper_subclass(cls, size, dtype=layer.dtype, device=layer.bitmask.device)
        made._layer = layer
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"weight of {self._layer}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        dense = lambda value: value._layer.dense_weight() if isinstance(value, _LazyWeight) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(dense, args), **torch.utils._pytree.tree_map(dense, kwargs or {}))
