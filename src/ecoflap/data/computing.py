"""Chooses the dtype that a model computes in, and tries it on one of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ecoflap.data.objectives import Objective, on_device
from ecoflap.model.compute import settled
from ecoflap.model.patching import cache_disabled
from ecoflap.model.trace import evaluating
from ecoflap.support.workers import ALONE, Workers


def computed_in(model: nn.Module, asked: str, batches: Sequence[Any], loss: Objective, workers: Workers = ALONE) -> str:
    """:func:`ecoflap.model.compute.settled` by the first worker, tried on the first batch."""

    def trial() -> None:
        with torch.no_grad(), evaluating(model), cache_disabled(model):
            on_device(loss)(model, batches[0])

    return workers.from_first(lambda: settled(asked, model, trial if len(batches) else None))
