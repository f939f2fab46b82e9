"""What a family of models brings to the matrix of tests: a pico model, its inputs, and what must be found in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One architecture at pico size (hidden 16-32, a few blocks, built in milliseconds).

    Attributes:
        name: as in the documentation's table ("qwen2_5_vl").
        build: ``build(seed=0)`` gives the model, weights filled by :func:`tests.picos.scramble`, eval mode.
        batches: ``batches(n=4, batch_size=2, padding=False, seed=0)`` gives inputs for which ``model(**batch).loss``
            works (or ``objective(model, batch)``); with ``padding`` texts differ in length.
        towers: modality and number of blocks of each prunable tower, in the order of a forward, from the config.
        processor: makes the processor that a checkpoint of this family comes with; None where the matrix needs none.
        objective: name of the loss; None for the one that fits the model.
    """

    name: str
    build: Callable[..., nn.Module]
    batches: Callable[..., Batches]
    towers: tuple[tuple[str, int], ...]
    processor: Callable[[], Any] | None = None
    objective: str | None = None
