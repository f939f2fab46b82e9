"""Computes logits only at the positions that the loss reads, a few rows at a time, to save time and memory.

A language model's head computes (positions, vocabulary) logits. A loss reads only the positions with a label, often a
few per cent, and a backward pass stores the table three times (values, softmax, gradient). Here, losses and KL
divergences are summed over groups of rows, each with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils import _pytree as pytree

from ecoflap.model.patching import Forward, forward_replaced, has_tangent, trim

LossOf = Callable[[Tensor, Tensor], Tensor]
_NUMBERS = 1 << 22  # logits at a time: 16 MiB in fp32; smaller parts cost more, as each reads the whole head
_NUMBERS_WITH_GRADIENT = 1 << 21  # four tables of that size exist at once


def summed(
    hidden: Tensor, targets: Tensor, loss_of: LossOf, classes: int, dtype: torch.dtype, *, frozen: bool
) -> Tensor:
    """Σ ``loss_of(part of hidden, part of targets)``, a scalar of ``dtype``; 0 without rows.

    Args:
        hidden: (rows, H).
        targets: (rows,).
        loss_of: the sum over the given rows; it needs memory for (rows, ``classes``) numbers.
        frozen: ``loss_of`` depends on nothing else that needs a gradient, so that its graph can be freed at once.
    """
    if frozen and torch.is_grad_enabled() and hidden.requires_grad and not has_tangent(hidden):
        found: Tensor = _Summed.apply(hidden, targets, loss_of, classes, dtype)  # type: ignore[no-untyped-call]
        return found
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    for part in _parts(len(hidden), max(1, _NUMBERS // classes)):
        total = total + loss_of(hidden[part], targets[part])
    return total


def _parts(rows: int, step: int) -> Iterator[slice]:
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, loss_of: LossOf, classes: int, dtype: torch.dtype) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for part in _parts(len(hidden), max(1, _NUMBERS_WITH_GRADIENT // classes)):
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                value = loss_of(leaf, targets[part])
            (gradient[part],) = torch.autograd.grad(value, leaf)
            total += value.detach()
            if hidden.device.type == "cpu":
                trim()  # otherwise the heap grows by a part's tables with every other part
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None


# Attributes and methods that need no values.
_FACTS = frozenset((
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")),
))  # fmt: skip

# Elementwise functions of the logits and plain numbers: casts, scales, soft caps.
_ELEMENTWISE = frozenset((
    Tensor.float, Tensor.to, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.__truediv__, Tensor.tanh,
    torch.mul, torch.div, torch.tanh,
))  # fmt: skip

_VIEWS = frozenset((Tensor.view, Tensor.reshape, Tensor.__getitem__, Tensor.contiguous))


@contextmanager
def logits_on_demand(model: nn.Module) -> Iterator[None]:
    """Context in which a head's output (see :func:`output_heads`) is not computed until its use is known.

    ``cross_entropy`` of it, also after reshaping, slicing, casting or scaling, multiplies only the rows whose target is
    not ignored, in parts, and computes the gradient of a part with its value if gradients are enabled. A bool mask of
    positions multiplies only those. Any other use computes all logits, as the head itself does. Losses and gradients
    agree with those of the plain forward up to the rounding of fp32: the products have other shapes, and the sums
    another order.
    """

    def deferring(forward: Forward) -> Forward:
        def defer(hidden: Any, *rest: Any, **kwargs: Any) -> Any:
            if rest or kwargs or not isinstance(hidden, Tensor) or hidden.dim() < 2:
                return forward(hidden, *rest, **kwargs)
            return _Logits.whole(hidden, head, forward)

        return defer

    with ExitStack() as wraps:
        for head in output_heads(model):
            wraps.enter_context(forward_replaced(head, deferring))
        yield


def output_heads(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that the model, or a model in it, names as its output embeddings; usually one."""
    found: dict[int, nn.Linear] = {}
    for module in model.modules():
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except NotImplementedError:  # a backbone without a head
            continue
        if type(head) is nn.Linear and head.out_features > 1:
            found[id(head)] = head
    return list(found.values())


@dataclass(frozen=True)
class _Product:
    """A deferred product of a head: ``hidden`` (..., H) times its weight."""

    hidden: Tensor
    head: nn.Linear
    forward: Forward

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of the flattened ``hidden``, by number."""
        return self.hidden.reshape(-1, self.hidden.shape[-1]).index_select(0, numbers)


class _Logits(Tensor):
    """A placeholder for some rows of ``steps(head(hidden))``, in shape (*rows.shape, classes).

    As a tensor it is one NaN, expanded to that shape, so that code which bypasses it gets NaNs. Once all logits were
    needed they are kept, so that later writes into them persist.
    """

    _product: _Product
    _numbers: Tensor  # which rows of the product, int64 in the leading shape
    _steps: tuple[Callable[[Tensor], Tensor], ...]
    _value: Tensor | None

    @classmethod
    def whole(cls, hidden: Tensor, head: nn.Linear, forward: Forward) -> _Logits:
        """All rows of the product of ``hidden`` with the head that ``forward`` computes."""
        lead = hidden.shape[:-1]
        numbers = torch.arange(lead.numel(), device=hidden.device).view(lead)
        return cls._made(_Product(hidden, head, forward), numbers, (), hidden.dtype)

    @classmethod
    def _made(
        cls, product: _Product, numbers: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...], dtype: torch.dtype
    ) -> _Logits:
        one = torch.full((), torch.nan, dtype=dtype, device=numbers.device)
        shown = one.expand(*numbers.shape, product.head.out_features).as_subclass(cls)
        shown._product, shown._numbers, shown._steps, shown._value = product, numbers.contiguous(), steps, None
        return shown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], _Logits) and args[0]._value is None:
            found = _deferred_result(func, args[0], args[1:], kwargs)
            if found is not None:
                return found
        args, kwargs = pytree.tree_map_only(_Logits, _computed, (args, kwargs))
        return func(*args, **kwargs)


def _computed(logits: _Logits) -> Tensor:
    """The logits of the plain forward."""
    if logits._value is not None:
        return logits._value
    product, numbers = logits._product, logits._numbers
    found: Tensor = product.forward(product.hidden)
    for step in logits._steps:
        found = step(found)
    classes = found.shape[-1]
    if numbers.numel() != found.shape[:-1].numel():
        found = found.reshape(-1, classes).index_select(0, numbers.flatten())
    logits._value = found = found.reshape(*numbers.shape, classes)
    return found


def _deferred_result(func: Any, logits: _Logits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of ``func``: another placeholder, or the loss; None if all logits are needed."""
    if func is functional.cross_entropy:
        return _loss(logits, *rest, **kwargs)
    if func is Tensor.__getitem__ and isinstance(rest[0], Tensor):
        return _chosen(logits, rest[0])
    if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((rest, kwargs))):
        return None
    product, numbers, steps = logits._product, logits._numbers, logits._steps
    if func in _ELEMENTWISE:
        step = partial(_applied, func, rest, kwargs)
        probe = step(torch.zeros(1, dtype=logits.dtype, device=logits.device))
        return _Logits._made(product, numbers, (*steps, step), probe.dtype) if probe.device == logits.device else None
    if func in _VIEWS:
        moved = _viewed(func, numbers.unsqueeze(-1).expand(logits.shape), rest, kwargs)
        return None if moved is None else _Logits._made(product, moved, steps, logits.dtype)
    return None


def _chosen(logits: _Logits, mask: Tensor) -> Tensor | None:
    """The computed rows where a bool ``mask`` of the leading shape is true; None for any other index."""
    if mask.dtype != torch.bool or mask.shape != logits._numbers.shape:
        return None
    return _rows(logits, logits._product.rows(logits._numbers[mask]))


def _rows(logits: _Logits, hidden: Tensor) -> Tensor:
    found: Tensor = logits._product.forward(hidden)
    for step in logits._steps:
        found = step(found)
    return found


def _applied(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> Tensor:
    found: Tensor = func(tensor, *rest, **kwargs)
    return found


def _viewed(func: Any, shown: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Row numbers after a view of ``shown``, which has a row's number at each of its logits; None if rows are cut."""
    if func is Tensor.contiguous:
        return shown[..., 0]
    if func is Tensor.__getitem__:
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        if not all(isinstance(one, slice | int) or one is Ellipsis for one in index):
            return None
    else:
        func = Tensor.view  # reshaping must not copy the table
    try:
        moved: Tensor = func(shown, *rest, **kwargs)
    except RuntimeError:
        return None
    kept = moved.dim() > 0 and moved.shape[-1] == shown.shape[-1] and moved.stride(-1) == 0
    return moved[..., 0] if kept else None


def _loss(
    logits: _Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``torch.nn.functional.cross_entropy`` of the rows that count; None for arguments that torch must handle."""
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or logits.dim() != 2 or target.dim() != 1 or target.is_floating_point() or len(logits) != len(target):
        return None
    counted = target != ignore_index
    product = logits._product

    def loss_of(hidden: Tensor, wanted: Tensor) -> Tensor:
        found = _rows(logits, hidden)
        return functional.cross_entropy(found, wanted, reduction="sum", label_smoothing=label_smoothing)

    frozen = not any(parameter.requires_grad for parameter in product.head.parameters())
    total = summed(
        product.rows(logits._numbers[counted]), target[counted], loss_of, logits.shape[-1], logits.dtype, frozen=frozen
    )
    return total / counted.sum() if reduction == "mean" else total


_KL_NUMBERS = 1 << 21  # logits compared at a time: 8 MiB in fp32, to fit into a processor's cache


def mean_kl(dense: Tensor, changed: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(dense) ‖ softmax(changed)), in nats.

    Computed in fp32 for all dtypes. The gradient with respect to ``changed``, (softmax(changed) - softmax(dense)) /
    rows, is computed with the value, in the dtype of ``changed``.

    Args:
        dense: (rows, classes) logits, without a gradient.
        changed: (rows, classes) logits.

    Returns:
        A scalar, fp32; 0 without rows.
    """
    found: Tensor = _MeanKL.apply(dense, changed)  # type: ignore[no-untyped-call]
    return found


class _MeanKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, changed: Tensor) -> Tensor:
        rows, classes = changed.shape
        gradient = torch.empty_like(changed) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=changed.device)
        step = max(1, _KL_NUMBERS // max(classes, 1))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            target, found = dense[part].float().log_softmax(dim=1), changed[part].float().log_softmax(dim=1)
            likely = target.exp()
            total += torch.linalg.vecdot(likely, target.sub_(found)).sum()
            if gradient is not None:
                gradient[part] = found.exp_().sub_(likely).div_(rows)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / max(rows, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outer.to(gradient.dtype)
