"""Criteria for the whole model: what a rule is that compares the weights of all layers with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ecoflap.importance.probe import ProbeContext
from ecoflap.network.parts import Layer
from ecoflap.progress import Task

Scores = Callable[[Layer], Tensor]


@runtime_checkable
class GlobalCriterion(Protocol):
    """A global rule: scores that are compared over the whole model, or over each tower, in one or several rounds."""

    @property
    def name(self) -> str: ...

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """Zeros that a pool of ``weights`` weights has after each round; the last is ``zeros``, none is above it.

        The number of rounds is the same for all pools.
        """
        ...

    def steps(self, batches: int) -> int:
        """Steps of progress that :meth:`scores` makes of so many batches."""
        ...

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """What the weights of a layer are worth in the model as it is now.

        Args:
            context: model, layers, calibration batches and objective.
            offload: keep what is as large as the model in the computer's memory.
            task: is told of each step.

        Returns:
            a function that gives the scores of one layer: fp32, at least 0, in the shape of the stored parameter. It
            gives the same ones at each call, as long as the layer's weights are the same.
        """
        ...
