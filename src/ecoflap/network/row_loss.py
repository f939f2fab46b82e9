"""A loss summed over rows, some at a time, with the gradient of each part formed beside its value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecoflap.network.heap import trim
from ecoflap.network.tangents import has_tangent

LossOf = Callable[[Tensor, Tensor], Tensor]
_NUMBERS = 1 << 22  # logits at a time: 16 MiB in fp32; fewer rows cost more, as each part reads the whole head
_NUMBERS_WITH_GRADIENT = 1 << 21  # four tables of that size exist at once


def summed(
    hidden: Tensor, targets: Tensor, loss_of: LossOf, classes: int, dtype: torch.dtype, *, frozen: bool
) -> Tensor:
    """Σ ``loss_of(part of hidden, part of targets)``, a scalar of ``dtype``; 0 without rows.

    Args:
        hidden: (rows, H).
        targets: (rows,).
        loss_of: sums over the rows that it is given, and holds (rows, ``classes``) numbers meanwhile.
        frozen: ``loss_of`` depends on nothing else that wants a gradient, so that its graph can be dropped at once.
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
                trim()  # or the heap grows by a part's tables with every other part
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None
