"""Holds the parts of one packed weight as parameters of a module, so that they are moved and offloaded with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ecoflap.errors import CheckpointError
from ecoflap.model.packed.checks import from_tensors
from ecoflap.model.packed.format import PackedWeight

PARTS = ("compressed", "bitmask", "row_offsets", "scales", "column_scales")
Self = TypeVar("Self", bound="PackedParts")


class PackedParts(nn.Module):
    """A packed weight of shape (..., C), in place of a parameter.

    Args:
        weight: the packed weight.
        dtype: of the dense weight, if the values are rounded.
        transposed: the model's dense weight has its last two dimensions exchanged.
    """

    compressed: nn.Parameter
    bitmask: nn.Parameter
    row_offsets: nn.Parameter
    shape: Tensor
    _none: Tensor

    def __init__(self, weight: PackedWeight, *, transposed: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.size, self.group_size, self.transposed = weight.shape, weight.group_size, transposed
        self.dtype = dtype or weight.compressed.dtype
        for name, part in weight.tensors().items():
            if name != "shape":
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.register_buffer("shape", torch.tensor(weight.shape, device=weight.bitmask.device))
        self.register_buffer("_none", torch.empty(0, device=weight.bitmask.device), persistent=False)
        self._unchecked = False  # whether the parts were on the disk when the model was loaded

    def packed(self) -> PackedWeight:
        """The weight made of the module's parts."""
        parts = {name: self._parameters[name] for name in PARTS if self._parameters.get(name) is not None}
        return PackedWeight(
            parts["compressed"], parts["bitmask"], parts["row_offsets"], self.size, parts.get("scales"),  # type: ignore[arg-type]
            self.group_size, parts.get("column_scales"),
        )  # fmt: skip

    def verify(self, name: str) -> None:
        """Check the parts after loading; offloaded ones are checked before their first use.

        Raises:
            CheckpointError: they disagree, or were not in the file.
        """
        found = {key: part for key, part in self._parameters.items() if key in PARTS and part is not None}
        for part in found.values():
            part.requires_grad_(False)
        self._unchecked = any(part.is_meta for part in found.values())
        if self._unchecked:
            return
        packed = from_tensors({**found, "shape": self.shape}, name, self.group_size)
        if packed.shape != self.size:
            raise CheckpointError(
                f"the packed weight '{name}' is {list(packed.shape)}, and the model's configuration says "
                f"{list(self.size)}: the files do not belong together"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load entries, which may have another number of values, and check them."""
        found = {name: state_dict[prefix + name] for name in (*PARTS, "shape") if prefix + name in state_dict}
        if len(found) > 1:
            packed = from_tensors(found, prefix.removesuffix("."), self.group_size)
            if packed.shape == self.size:
                values = packed.compressed.new_empty(len(packed.compressed), device=self.bitmask.device)
                self.compressed = nn.Parameter(values, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in the base class, but scales stay float32: 16 bits would add to the rounding error."""
        scales = self._parameters.pop("scales", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None:
            moved = fn(scales.data)
            self._parameters["scales"] = nn.Parameter(moved.float(), requires_grad=False)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.shape.device)).dtype
        return self

    def _told(self) -> str:
        """Sparsity and kind of values, for a module's description."""
        packed = self.packed()
        kept = self.compressed.numel() * (2 if packed.values == "int4" else 1)  # two to a byte, or nearly so
        dense = 1
        for size in self.size:
            dense *= size
        kind = str(self.compressed.dtype).removeprefix("torch.") if packed.scales is None else packed.values
        return f"sparsity={1 - kept / max(dense, 1):.3f}, values={kind}"
