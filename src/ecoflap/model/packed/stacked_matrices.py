"""Lets a mixture's own code compute with packed experts.

The module of the experts finds a tensor where its parameter was: it has the parameter's shape, an index gives one
expert's matrix, and products with either are computed from the packed parts. So each family's code runs as it is, in
every implementation that transformers has. What is no product unpacks the matrices that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.packed.stack import SUFFIX, PackedStack
from ecoflap.model.slices import factors


class StackedMatrices(Tensor):
    """Looks like a stacked parameter, or like one matrix of it, and computes from the packed parts."""

    _stack: PackedStack
    _number: int | None  # of the matrix; None: all
    _is_hf_initialized: bool  # as transformers asks it
    _flipped: bool  # the last two dimensions are exchanged

    @staticmethod
    def __new__(cls, stack: PackedStack, number: int | None = None, flipped: bool = False) -> StackedMatrices:
        count, rows, columns = stack.stored_size
        size = (columns, rows) if flipped else (rows, columns)
        made: StackedMatrices = Tensor._make_wrapper_subclass(
            cls, size if number is not None else (count, *size), dtype=stack.dtype, device=stack.bitmask.device
        )
        made._stack, made._number, made._flipped = stack, number, flipped
        made._is_hf_initialized = True  # transformers must not draw it
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{tuple(self.shape)} of {self._stack}"

    def dense(self) -> Tensor:
        """Its values, as a plain tensor."""
        stack = self._stack
        found = (
            stack(self._number) if self._number is not None else torch.stack([stack(n) for n in range(stack.size[0])])
        )
        return found.transpose(-2, -1) if self._flipped else found

    def product(self, number: int, x: Tensor, outputs_first: bool) -> Tensor:
        """``x`` (tokens, inputs) times matrix ``number``, which this tensor has as (outputs, inputs) or the reverse."""
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
            found = this._seen(name, args[1:], kwargs)
            if found is not None:
                return found
        if name in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _PRODUCTS and (result := _product(func, args, kwargs)) is not None:
            return result
        plain = lambda value: value.dense() if isinstance(value, StackedMatrices) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs))

    def _seen(self, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        """What is another view of the same parts; None for anything else."""
        if name in ("T", "mT", "t") or (name in ("transpose", "swapaxes") and self._of_last_two(args)):
            return StackedMatrices(self._stack, self._number, not self._flipped) if self._swaps(name) else None
        if name in ("data", "detach", "contiguous"):
            return self
        if name == "data_ptr":
            return 0
        if self._number is not None or name not in ("__getitem__", "select", "unbind", "__iter__", "index_select"):
            return None
        if name in ("unbind", "__iter__"):
            return None if args or kwargs else tuple(self._one(number) for number in range(len(self)))
        if name in ("select", "index_select"):
            if len(args) != 2 or args[0] != 0:
                return None
            args = args[1:]
        index = args[0]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()):
            return self._one(int(index))
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
            wanted, places = torch.unique(index, return_inverse=True)
            if not len(wanted):
                return torch.empty(0, *self.shape[1:], dtype=self.dtype, device=self.device)
            return torch.stack([self._one(int(number)).dense() for number in wanted])[places]
        return None

    def _one(self, number: int) -> StackedMatrices:
        count = self._stack.size[0]
        if not -count <= number < count:
            raise IndexError(f"index {number} is out of range for {count} experts")
        return StackedMatrices(self._stack, number % count, self._flipped)

    def _swaps(self, name: str) -> bool:
        return name not in ("T", "t") or self._number is not None

    def _of_last_two(self, dims: Sequence[Any]) -> bool:
        size = 2 if self._number is not None else 3
        return len(dims) == 2 and {int(dim) % size for dim in dims} == {size - 2, size - 1}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = lambda value: value.dense() if isinstance(value, StackedMatrices) else value  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))


# Answered by the wrapper itself, which has a shape, a dtype and a device, and no values.
_OF_SHAPE = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "is_meta", "is_cuda",
    "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_xpu", "is_mps", "is_hpu", "itemsize", "nbytes", "names",
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "element_size", "storage_offset", "untyped_storage", "__len__", "__hash__",
))  # fmt: skip
_PRODUCTS = frozenset(("linear", "matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm"))


def _product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """x times the packed matrices; None where they are no factor on the right."""
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
        for number, end in enumerate(ends.tolist()):
            if end > start:
                parts.append(weight.product(number, x[start:end], outputs_first))
            start = end
        rest = x.new_zeros(len(x) - start, weight.shape[-1])  # rows of no expert
        return torch.cat([*parts, rest])
    if outputs_first or x.dim() != 3 or len(x) != len(weight):
        return None
    return torch.stack([weight.product(number, one, outputs_first) for number, one in enumerate(x)])


def owner_with(module: nn.Module, leaf: str, stack: PackedStack) -> None:
    """Put ``stack`` in the place of the parameter ``leaf`` of ``module``, whose class gets a property of that name.

    The class is one of its own for this module, with the same name, derived from the one that it had.
    """
    del module._parameters[leaf]
    module.add_module(leaf + SUFFIX, stack)
    kind = type(module)
    stacks = (*getattr(kind, "_packed_stacks", ()), leaf)
    base = kind.__mro__[1] if hasattr(kind, "_packed_stacks") else kind
    module.__class__ = _class_with(base, stacks)


def owner_without(module: nn.Module, leaf: str, dense: nn.Parameter) -> None:
    """Undo :func:`owner_with`: the parameter is ``dense`` from now on."""
    kind = type(module)
    stacks = tuple(name for name in kind._packed_stacks if name != leaf)  # type: ignore[attr-defined]
    base = kind.__mro__[1]
    del module._modules[leaf + SUFFIX]
    module.__class__ = _class_with(base, stacks) if stacks else base
    module.register_parameter(leaf, dense)


def _class_with(base: type[nn.Module], stacks: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {leaf: _found_as(leaf) for leaf in stacks}
    body |= {"_packed_stacks": stacks, "__module__": base.__module__, "__qualname__": base.__qualname__,
             "__reduce_ex__": _reduced, "__doc__": base.__doc__}  # fmt: skip
    return type(base.__name__, (base,), body)


def _found_as(leaf: str) -> property:
    return property(lambda module: StackedMatrices(module._modules[leaf + SUFFIX]))


def _reduced(module: Any, protocol: Any) -> Any:
    """For copies and pickles: the class is made again."""
    return _made_again, (type(module).__mro__[1], type(module)._packed_stacks), module.__dict__


def _made_again(base: type[nn.Module], stacks: tuple[str, ...]) -> nn.Module:
    kind = _class_with(base, stacks)
    return kind.__new__(kind)
