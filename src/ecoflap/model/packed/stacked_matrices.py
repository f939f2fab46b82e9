"""Tensor subclasses that stand for the stacked parameter of a mixture, and compute from its packed matrices.

They have the parameter's shape, an index gives one expert's matrix, and matrix products use the packed parts. So the
code of each model family runs unchanged, in every implementation that transformers has. Other operations unpack the
matrices that they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ecoflap.model.packed.stack import PackedStack
from ecoflap.model.slices import factors


class StackedMatrices(Tensor):
    """Stands for a stacked parameter, or for one matrix of it."""

    _stack: PackedStack
    _number: int | None  # of the one matrix; None for several
    _chosen: tuple[int, ...]  # numbers of the matrices if there are several, in order
    _is_hf_initialized: bool  # True, so that transformers does not draw initial values
    _flipped: bool  # the last two dimensions are exchanged

    @staticmethod
    def __new__(
        cls, stack: PackedStack, number: int | None = None, flipped: bool = False, chosen: tuple[int, ...] | None = None
    ) -> StackedMatrices:
        count, rows, columns = stack.stored_size
        size: tuple[int, ...] = (columns, rows) if flipped else (rows, columns)
        if number is None:
            size = (count if chosen is None else len(chosen), *size)
        chosen = tuple(range(count)) if chosen is None else chosen
        made: StackedMatrices = Tensor._make_wrapper_subclass(cls, size, dtype=stack.dtype, device=stack.bitmask.device)
        made._stack, made._number, made._flipped, made._chosen = stack, number, flipped, chosen
        made._is_hf_initialized = True
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{tuple(self.shape)} of {self._stack}"

    def dense(self) -> Tensor:
        """Its values, as a plain tensor."""
        if self._number is not None:
            found: Tensor = self._stack(self._number)
        else:
            places = self.places()
            if not places:
                return torch.empty(self.shape, dtype=self.dtype, device=self.device)
            found = torch.stack([self._stack(number) for number in places])
            order = {number: place for place, number in enumerate(places)}
            found = found if len(places) == len(self) else found[[order[number] for number in self._chosen]]
        return found.transpose(-2, -1) if self._flipped else found

    def places(self) -> dict[int, list[int]]:
        """For each matrix of this tensor, by its number: its indices along the first dimension."""
        found: dict[int, list[int]] = {}
        for place, number in enumerate(self._chosen):
            found.setdefault(number, []).append(place)
        return found

    def product(self, number: int, x: Tensor, outputs_first: bool) -> Tensor:
        """``x`` (tokens, inputs) times matrix ``number``.

        Args:
            outputs_first: whether this tensor shows the matrix as (outputs, inputs), not (inputs, outputs).
        """
        stack = self._stack
        if outputs_first == (stack.transposed == self._flipped):  # the packed rows are the outputs
            result: Tensor = stack(number, x)
            return result
        dense: Tensor = stack(number)  # no kernel multiplies by columns
        return x @ (dense.t() if outputs_first != self._flipped else dense)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        this = args[0] if args else None
        if isinstance(this, StackedMatrices):
            found = this._view_of(name, args[1:], kwargs)
            if found is not None:
                return found
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _PRODUCTS and (result := _product(func, args, kwargs)) is not None:
            return result
        plain = lambda value: value.dense() if isinstance(value, StackedMatrices) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs))

    def _view_of(self, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        """The result of a view or an index; None for other operations."""
        if name in ("T", "mT", "t") or (name in ("transpose", "swapaxes") and self._are_last_two(args)):
            if not self._swaps(name):
                return None
            return StackedMatrices(self._stack, self._number, not self._flipped, self._chosen)
        if name in ("data", "detach", "contiguous"):
            return self
        if name == "data_ptr":
            return 0
        if self._number is not None or name not in ("__getitem__", "select", "unbind", "__iter__", "index_select"):
            return None
        if name in ("unbind", "__iter__"):
            return None if args or kwargs else tuple(self._matrix(number) for number in range(len(self)))
        if name in ("select", "index_select"):
            if len(args) != 2 or args[0] != 0:
                return None
            args = args[1:]
        index = args[0]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()):
            return self._matrix(int(index))
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
            chosen = tuple(self._number_at(number) for number in index.tolist())
            return StackedMatrices(self._stack, None, self._flipped, chosen)
        return None

    def _matrix(self, place: int) -> StackedMatrices:
        return StackedMatrices(self._stack, self._number_at(place), self._flipped)

    def _number_at(self, place: int) -> int:
        count = len(self._chosen)
        if not -count <= place < count:
            raise IndexError(f"index {place} is out of range for {count} experts")
        return self._chosen[place]

    def _swaps(self, name: str) -> bool:
        return name not in ("T", "t") or self._number is not None

    def _are_last_two(self, dims: Sequence[Any]) -> bool:
        size = 2 if self._number is not None else 3
        return len(dims) == 2 and {int(dim) % size for dim in dims} == {size - 2, size - 1}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = lambda value: value.dense() if isinstance(value, StackedMatrices) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))


# Attributes and methods that need no values: the wrapper has shape, dtype and device.
_METADATA = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "is_meta", "is_cuda",
    "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_xpu", "is_mps", "is_hpu", "itemsize", "nbytes", "names",
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "element_size", "storage_offset", "untyped_storage", "__len__", "__hash__",
))  # fmt: skip
_PRODUCTS = frozenset(("linear", "matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm"))


def _product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """A product of x and packed matrices, computed from the packed parts; None for other products."""
    if getattr(func, "__name__", "") == "bmm" and len(args) == 2 and isinstance(args[0], StackedMatrices):
        weight, x = args
        if isinstance(x, StackedMatrices) or weight._number is not None or x.dim() != 3 or len(x) != len(weight):
            return None
        return _each(weight, x.transpose(1, 2), outputs_first=True).transpose(1, 2)
    found = factors(func, args, kwargs)
    if found is None:
        return None
    x, weight, _, outputs_first, ends = found
    if not isinstance(weight, StackedMatrices) or isinstance(x, StackedMatrices):
        return None
    if weight._number is not None:
        result = weight.product(weight._number, x, outputs_first)
        bias = kwargs.get("bias", args[2] if outputs_first and len(args) > 2 else None)
        return result if bias is None else result + bias
    if ends is not None:
        parts, start = [], 0
        for number, end in zip(weight._chosen, ends.tolist(), strict=True):
            if end > start:
                parts.append(weight.product(number, x[start:end], outputs_first))
            start = end
        rest = x.new_zeros(len(x) - start, weight.shape[-1])  # rows that belong to no expert
        return torch.cat([*parts, rest])
    if outputs_first or x.dim() != 3 or len(x) != len(weight):
        return None
    return _each(weight, x, outputs_first)


def _each(weight: StackedMatrices, x: Tensor, outputs_first: bool) -> Tensor:
    """``x[i]`` (tokens, inputs) times the i-th matrix, for each i; one product for all rows of the same matrix."""
    places = weight.places()
    parts = [
        weight.product(number, x[at].flatten(0, 1), outputs_first).view(len(at), x.shape[1], -1)
        for number, at in places.items()
    ]
    order = [place for at in places.values() for place in at]
    found = torch.cat(parts) if parts else x.new_empty(0, x.shape[1], weight.shape[1 if outputs_first else 2])
    return found if order == sorted(order) else found[sorted(range(len(order)), key=order.__getitem__)]


class FlatMatrices(Tensor):
    """Stands for a 2-dimensional parameter of concatenated matrices; its 3-dimensional view is a StackedMatrices."""

    _stack: PackedStack
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, stack: PackedStack) -> FlatMatrices:
        count, rows, columns = stack.stored_size
        made: FlatMatrices = Tensor._make_wrapper_subclass(
            cls, (count * rows, columns), dtype=stack.dtype, device=stack.bitmask.device
        )
        made._stack, made._is_hf_initialized = stack, True
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{tuple(self.shape)} of {self._stack}"

    def view(self, *size: Any) -> Tensor:
        """A StackedMatrices if ``size`` is (matrices, rows, columns); else a view of the dense values."""
        wanted = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
        whole = self._stack.stored_size
        if len(wanted) == 3 and wanted[1:] == whole[1:] and wanted[0] in (-1, whole[0]):
            return StackedMatrices(self._stack)
        return self._stack.dense_weight().view(*size)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = lambda value: value._stack.dense_weight() if isinstance(value, FlatMatrices) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))
