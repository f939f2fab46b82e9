"""Defines what every stage receives besides its own options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ecoflap.support.progress import Progress, Silent
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """The loss, the seed, the progress, and the workers that share the work.

    Attributes:
        loss: ``loss(model, batch)`` gives a scalar tensor.
        seed: of all noise and random choices.
        workers: processes that hold the same model and batches.
        compute: ``native`` or ``float32``, see :mod:`ecoflap.model.compute`.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    workers: Workers = ALONE
    compute: str = "native"
