"""Mean KL divergence of two tables of logits, a few rows at a time: a vocabulary's probabilities never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NUMBERS = 1 << 21  # compared at a time: 8 MiB in fp32, what a processor's cache holds


def mean_kl(dense: Tensor, changed: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(dense) ‖ softmax(changed)), in nats.

    Computed in fp32 whatever the dtypes. The gradient by ``changed``, (softmax(changed) - softmax(dense)) / rows, is
    formed with the value, in the dtype of ``changed``.

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
        step = max(1, _NUMBERS // max(classes, 1))
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
