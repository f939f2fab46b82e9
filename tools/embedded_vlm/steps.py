"""The optimiser loop that the three training stages share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def optimise(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    report: Callable[[int], str],
    label: str,
    every: int = 200,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """AdamW with warm-up, then a cosine down to zero; gradients clipped at norm 1.

    ``loss(step)`` returns the scalar to minimise; every ``every`` steps ``report(step)`` is printed and ``checkpoint``
    called. Raises FloatingPointError if the loss is not finite.
    """
    weights = [p for p in parameters if p.requires_grad]
    matrices = [p for p in weights if p.ndim >= 2]
    vectors = [p for p in weights if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    warm_up = max(1, min(200, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))),
    )
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        value = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{label}: loss is {value.item()} at step {step}")
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        running += value.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            count = (step % every) + 1
            print(f"{label} {step + 1}/{steps} {seconds:.0f}s loss {running / count:.4f} {report(step)}", flush=True)
            running = 0.0
            if checkpoint is not None:
                checkpoint()
