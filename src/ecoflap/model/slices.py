"""Matrices that are part of a larger parameter, such as one expert's slice of a mixture's stacked weights.

Names, reads and writes such matrices, and finds the products of a running module that multiply by them. A product is
recognised by its factor's address in memory, however the module takes the slice: by an index, in a loop, transposed, or
all slices at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.model.parts import parameter_of
from ecoflap.model.patching import Forward, forward_replaced

_INDEXED = re.compile(r"(.+)\[(\d+)(?:/(\d+))?\]")
# Operations that multiply by a weight, with the position of the input; the weight is the next argument.
_PRODUCTS = {"matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}
_NAMED = {"linear": ("input", "weight"), "_grouped_mm": ("self", "mat2")}  # names of keyword arguments


def slice_name(parameter: str, index: int, of: int = 0) -> str:
    """The name of one matrix of a stacked parameter: ``…experts.gate_up_proj[3]``.

    Args:
        of: the number of matrices if they are concatenated in a 2-dimensional parameter, whose shape does not show it:
            ``…experts.mlp.w1[3/16]`` (DBRX).
    """
    return f"{parameter}[{index}/{of}]" if of else f"{parameter}[{index}]"


def matrix_in(parameter: Tensor, name: str) -> Tensor:
    """The matrix called ``name``, as it is stored in its parameter: the parameter itself, or a view of its slice."""
    found = _INDEXED.fullmatch(name)
    if found is None:
        return parameter
    if found[3] is not None:  # this number of matrices, concatenated
        parameter = parameter.view(int(found[3]), -1, parameter.shape[1])
    elif parameter.dim() == 2:  # square matrices, concatenated: q, k and v of torch's attention
        parameter = parameter.view(-1, parameter.shape[1], parameter.shape[1])
    return parameter[int(found[2])]


def stored_matrix(model: nn.Module, name: str) -> Tensor:
    """The matrix called ``name`` as it is stored, detached; writing to it changes the model.

    Raises:
        AttributeError: the model has no such parameter.
    """
    return matrix_in(model.get_parameter(parameter_of(name)).data, name)


@dataclass(frozen=True)
class Stack:
    """How a parameter stacks matrices.

    Attributes:
        turned: each is stored as (inputs, outputs).
        count: number of matrices.
        flat: the parameter has two dimensions, with the matrices concatenated along the first.
    """

    turned: bool
    count: int
    flat: bool = False


@dataclass(frozen=True)
class Product:
    """A product of an input and the slices of a stacked parameter.

    Attributes:
        x: (..., inputs) for one slice; (slices, tokens, inputs) for several; (tokens, inputs) with ``ends``.
        first: index of the first slice.
        count: number of slices; 0: one slice as a 2-dimensional matrix.
        turned: the stored slice is (inputs, outputs).
        place: position or name of the weight among the arguments.
        ends: for several slices that divide the rows of ``x``: the end (exclusive) of each one's rows.
        of: total number of slices if the parameter has two dimensions; else 0.
    """

    x: Tensor
    first: int
    count: int
    turned: bool
    place: int | str
    ends: Tensor | None = None
    of: int = 0

    def inputs(self) -> Iterator[tuple[int, Tensor]]:
        """Index and input (tokens, inputs) of each slice that has an input."""
        if not self.count:
            yield self.first, self.x
        elif self.ends is not None:
            start = 0
            for number, end in enumerate(self.ends.tolist()):
                if end > start:
                    yield self.first + number, self.x[start:end]
                start = end
        else:
            for number in range(self.count):
                yield self.first + number, self.x[number]


def product_with(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, stacked: Tensor) -> Product | None:
    """The product, if this call of a torch function multiplies an input by slices of ``stacked``.

    Args:
        stacked: (slices, rows, columns), contiguous; or (slices · rows, columns), multiplied by one slice at a time.
    """
    found = factors(func, args, kwargs)
    return None if found is None else _located(*found, stacked)


def factors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor, int | str, bool, Tensor | None] | None:
    """Input, weight, its position, whether it is (outputs, inputs), ends of row groups; None if it is no product."""
    name, kwargs = getattr(func, "__name__", ""), kwargs or {}
    if name == "linear":
        at = 0
    elif name in _PRODUCTS:
        at = _PRODUCTS[name]
    else:
        return None
    x: Any
    weight: Any
    if len(args) > at + 1:
        x, weight, place = args[at], args[at + 1], at + 1
    elif name in _NAMED:
        x = args[0] if args else kwargs.get(_NAMED[name][0])
        weight, place = kwargs.get(_NAMED[name][1]), _NAMED[name][1]  # type: ignore[assignment]
    else:
        return None
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return None
    ends = kwargs.get("offs")
    if ends is None and name == "_grouped_mm" and len(args) > 2:
        ends = args[2]
    return x, weight, place, name == "linear", ends


def _located(
    x: Tensor, weight: Tensor, place: int | str, outputs_first: bool, ends: Tensor | None, stacked: Tensor
) -> Product | None:
    if weight.dtype != stacked.dtype or weight.device != stacked.device or weight.dim() not in (2, 3):
        return None
    if stacked.is_meta or not stacked.is_contiguous():
        return None
    of = 0
    if stacked.dim() == 2:
        whole, columns = stacked.shape
        rows = weight.shape[1 if weight.stride(-1) != 1 else 0]
        if weight.dim() != 2 or not 0 < rows < whole or whole % rows:
            return None
        of = whole // rows
        stacked = stacked.detach().view(of, rows, columns)
    rows, columns = stacked.shape[1:]
    start, rest = divmod(weight.data_ptr() - stacked.data_ptr(), stacked.element_size() * rows * columns)
    count = len(weight) if weight.dim() == 3 else 0
    if rest or not 0 <= start <= len(stacked) - max(1, count) or (count > 1 and weight.stride(0) != rows * columns):
        return None
    shape, strides = tuple(weight.shape[-2:]), weight.stride()[-2:]
    if shape == (rows, columns) and strides == (columns, 1):
        flipped = False
    elif shape == (columns, rows) and strides == (1, columns):
        flipped = True
    else:
        return None
    return Product(x, start, count, outputs_first == flipped, place, ends if count else None, of)


Replace = Callable[[str, Product], Mapping[int, Tensor]]


class _Products(TorchFunctionMode):
    """Calls ``seen`` before each product with slices of a module's parameters; its result replaces slices."""

    def __init__(self, owner: nn.Module, leaves: Sequence[str], seen: Replace) -> None:
        super().__init__()
        self._owner, self._leaves, self._seen = owner, leaves, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = factors(func, args, kwargs)
        for leaf in self._leaves if found is not None else ():
            stacked = self._owner._parameters[leaf]
            product = None if stacked is None or found is None else _located(*found, stacked)
            if product is not None:
                others = self._seen(leaf, product)
                if others and found is not None:
                    args, kwargs = _with_weight(args, kwargs, product.place, _standing_in(found[1], product, others))
                break
        return func(*args, **(kwargs or {}))


def _standing_in(weight: Tensor, product: Product, others: Mapping[int, Tensor]) -> Tensor:
    """The weight of a product with some slices replaced by other matrices, which are given as they are stored."""
    flipped = weight.stride(-1) != 1
    inside = range(product.first, product.first + max(1, product.count))
    if not product.count:
        stacked = others.get(product.first)
        if stacked is None:
            return weight
    elif all(number in others for number in inside):
        stacked = torch.stack([others[number] for number in inside])
    else:
        stacked = weight.transpose(-2, -1) if flipped else weight
        for number in inside:
            if number in others:
                stacked = torch.select_scatter(stacked, others[number], 0, number - product.first)
    return stacked.transpose(-2, -1) if flipped else stacked


def _with_weight(args: Any, kwargs: Any, place: int | str, weight: Tensor) -> tuple[Any, Any]:
    if isinstance(place, str):
        return args, {**kwargs, place: weight}
    return (*args[:place], weight, *args[place + 1 :]), kwargs


@contextmanager
def products_seen(model: nn.Module, owners: Mapping[str, Iterable[str]], seen: Callable[..., Any]) -> Iterator[None]:
    """Context that calls ``seen(owner, leaf, product)`` before each product with slices of these parameters.

    It may return None, or matrices by index of slice, which replace the slices. Forwards that a backward pass repeats
    are included.

    Args:
        owners: for each path of a module the names of its stacked parameters.
    """

    def wrapper(path: str, owner: nn.Module, leaves: Sequence[str]) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                with _Products(owner, leaves, lambda leaf, product: seen(path, leaf, product) or {}):
                    return forward(*args, **kwargs)

            return run

        return wrap

    with ExitStack() as wraps:
        for path, leaves in owners.items():
            owner = model.get_submodule(path)
            wraps.enter_context(forward_replaced(owner, wrapper(path, owner, tuple(leaves))))
        yield


@contextmanager
def experts_in_turn(model: nn.Module) -> Iterator[None]:
    """Context in which mixtures of transformers multiply by one expert after another, without a fused kernel.

    This is ``experts_implementation="eager"``, each family's own code. It works for all dtypes, has derivatives in both
    modes, and shows each expert's input. Its results differ from those of other implementations in the order of sums.
    """
    name = "_experts_implementation_internal"
    found = (getattr(module, "config", None) for module in model.modules() if _stacks(module))
    configs = {id(config): config for config in found if name in getattr(config, "__dict__", {})}
    before = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


def _stacks(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
