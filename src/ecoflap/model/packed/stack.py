"""Packs the stacked parameter of a mixture so that each expert's matrix can be read by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.packed.format import PackedWeight, unpack_weight
from ecoflap.model.packed.holder import PackedParts
from ecoflap.model.packed.ops import packed_linear

SUFFIX = "_packed"  # of the submodule's name: rules of transformers that rename ``gate_up_proj`` must not match it


class PackedStack(PackedParts):
    """The packed matrices (count, outputs, inputs) of a stacked parameter.

    Args:
        weight: of that shape.
        transposed: the model stores each matrix as (inputs, outputs).
        flat: the model's parameter has two dimensions, with the matrices concatenated along the first.
    """

    def __init__(
        self, weight: PackedWeight, *, transposed: bool = False, flat: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(weight, transposed=transposed, dtype=dtype)
        self.flat = flat
        self._starts: list[int] = []  # index of each matrix's first value

    @property
    def stored_size(self) -> tuple[int, int, int]:
        """Shape of the model's parameter; of its 3-dimensional view if it is flat."""
        count, rows, columns = self.size
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def matrix(self, number: int) -> PackedWeight:
        """The packed matrix of one expert, (outputs, inputs), as views of the parts."""
        _, rows, columns = self.size
        offsets = self.row_offsets
        if not self._starts:
            self._starts = [*offsets[::rows].tolist(), len(self.compressed)]
        begin, end = self._starts[number : number + 2]
        inside = slice(number * rows, (number + 1) * rows)
        scales = self._parameters.get("scales")
        its_scales = None if scales is None else scales[inside]
        by_columns = self._parameters.get("column_scales")
        return PackedWeight(
            self.compressed[begin:end], self.bitmask[inside], offsets[inside] - begin, (rows, columns), its_scales,
            self.group_size, None if by_columns is None else by_columns[number : number + 1],
        )  # fmt: skip

    def dense(self, number: int) -> Tensor:
        """One expert's matrix as the model stores it."""
        found = unpack_weight(self.matrix(number), self.dtype).detach()
        return found.t().contiguous() if self.transposed else found

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """All matrices as the model stores them."""
        found = unpack_weight(self.packed(), dtype or self.dtype).detach()
        return as_stored(found, self.transposed, self.flat)

    def forward(self, number: int, x: Tensor | None = None) -> Tensor:
        """x Wᵀ with one expert's W of (outputs, inputs); without ``x`` the matrix as the model stores it.

        This is the module's forward, so that hooks which load its parts from the disk run first.
        """
        if self._unchecked:
            self.verify("experts on the disk")
            self._starts = []
        if x is None:
            return self.dense(number)
        return packed_linear(x, self.matrix(number))

    def verify(self, name: str) -> None:
        super().verify(name)
        self._starts = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._starts = []

    def extra_repr(self) -> str:
        count, rows, columns = self.size
        return f"matrices={count}, in_features={columns}, out_features={rows}, {self._told()}"


def as_packed(parameter: Tensor, transposed: bool, count: int = 0) -> Tensor:
    """The matrices (count, outputs, inputs) of a parameter; ``count`` is 0 unless it has only two dimensions."""
    matrices = parameter.unflatten(0, (count, -1)) if count else parameter  # type: ignore[no-untyped-call]
    return matrices.transpose(-2, -1).contiguous() if transposed else matrices


def as_stored(matrices: Tensor, transposed: bool, flat: bool) -> Tensor:
    """Undo :func:`as_packed`."""
    found = matrices.transpose(-2, -1).contiguous() if transposed else matrices
    return found.flatten(0, 1) if flat else found


def stacks_of(model: nn.Module) -> dict[str, PackedStack]:
    """The packed stacks of a model, by the names of the parameters that they replace."""
    return {
        path.removesuffix(SUFFIX): module for path, module in model.named_modules() if isinstance(module, PackedStack)
    }
