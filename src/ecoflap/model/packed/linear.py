"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.errors import CheckpointError
from ecoflap.model.packed.checks import from_tensors
from ecoflap.model.packed.format import PackedWeight, unpack_weight
from ecoflap.model.packed.ops import multiply

_PARTS = ("compressed", "bitmask", "row_offsets", "scales")


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with a packed W of (outputs, inputs); takes the place of ``nn.Linear`` and of transformers' Conv1D.

    Its parts are parameters without a gradient, so that what moves or offloads a layer moves them; ``weight`` is the
    dense weight, unpacked when something is computed with it.

    Args:
        weight: the packed matrix; for Conv1D that of Wᵀ, with ``transposed``.
        bias: (outputs,) or None.
        transposed: the layer whose place this takes stores its weight as (inputs, outputs).
        dtype: of the dense weight, where the values are rounded.
    """

    compressed: nn.Parameter
    bitmask: nn.Parameter
    row_offsets: nn.Parameter
    shape: Tensor
    _none: Tensor

    def __init__(
        self,
        weight: PackedWeight,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_size, self.transposed = weight.group_size, transposed
        self.dtype = dtype or weight.compressed.dtype
        for name, part in weight.tensors().items():
            if name != "shape":
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_buffer("shape", torch.tensor(weight.shape, device=weight.bitmask.device))
        self.register_buffer("_none", torch.empty(0, device=weight.bitmask.device), persistent=False)
        self.register_parameter("bias", bias)
        self._unchecked = False  # whether the parts were on the disk when the model was loaded

    def forward(self, x: Tensor) -> Tensor:
        if self._unchecked:
            self.verify("a layer on the disk")
        scales = self.scales if "scales" in self._parameters else self._none
        bias = self._none if self.bias is None else self.bias
        return multiply(x, self.compressed, self.bitmask, self.row_offsets, scales, bias, self.group_size)  # type: ignore[arg-type]

    def packed(self) -> PackedWeight:
        """The weight as it lies here."""
        parts = {name: self._parameters[name] for name in _PARTS if self._parameters.get(name) is not None}
        shape = (self.out_features, self.in_features)
        return PackedWeight(
            parts["compressed"], parts["bitmask"], parts["row_offsets"], shape, parts.get("scales"), self.group_size  # type: ignore[arg-type]
        )  # fmt: skip

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, laid out as the layer had it whose place this takes."""
        dense = unpack_weight(self.packed(), dtype or self.dtype).detach()
        return dense.t().contiguous() if self.transposed else dense

    @property
    def weight(self) -> Tensor:
        """The dense weight: its shape, dtype and device at once, its values when something is computed with it."""
        return _LazyWeight(self)

    def verify(self, name: str) -> None:
        """Check the parts after loading, as far as they are in memory; those on the disk before their first use.

        Raises:
            CheckpointError: they disagree, or were not in the file.
        """
        for part in self._parameters.values():
            if part is not None and part is not self.bias:
                part.requires_grad_(False)
        self._unchecked = any(part.is_meta for part in self._parameters.values() if part is not None)
        if self._unchecked:
            return
        found = {key: part for key, part in self._parameters.items() if key in _PARTS and part is not None}
        packed = from_tensors({**found, "shape": self.shape}, name, self.group_size)
        if packed.shape != (self.out_features, self.in_features):
            raise CheckpointError(
                f"the packed weight '{name}' is {list(packed.shape)}, and the model's configuration says "
                f"{[self.out_features, self.in_features]}: the files do not belong together"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Entries are checked, and may hold another number of values than there are now."""
        found = {name: state_dict[prefix + name] for name in (*_PARTS, "shape") if prefix + name in state_dict}
        if len(found) > 1:
            packed = from_tensors(found, prefix.removesuffix("."), self.group_size)
            if packed.shape == (self.out_features, self.in_features):
                values = packed.compressed.new_empty(len(packed.compressed), device=self.bitmask.device)
                self.compressed = nn.Parameter(values, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """As for any module, but scales stay float32: 16 bits would add to the error of rounded values."""
        scales = self._parameters.pop("scales", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None:
            moved = fn(scales.data)
            self._parameters["scales"] = nn.Parameter(moved.float(), requires_grad=False)
        changed = fn(torch.empty(0, dtype=self.dtype, device=self.shape.device)).dtype
        self.dtype = changed
        return self

    def extra_repr(self) -> str:
        packed = self.packed()
        kept = self.compressed.numel() * (2 if packed.values == "int4" else 1)  # two to a byte, or nearly so
        share = 1 - kept / max(self.out_features * self.in_features, 1)
        kind = str(self.compressed.dtype).removeprefix("torch.") if packed.scales is None else packed.values
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={share:.3f}, values={kind}"
        )


class _LazyWeight(Tensor):
    """Looks like a layer's dense weight, and becomes it when an operator meets it."""

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
