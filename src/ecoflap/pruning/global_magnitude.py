"""Global magnitude: the smallest weights of the whole model (or of each tower) go; the simplest baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecoflap.importance.probe import ProbeContext
from ecoflap.network.parts import Layer
from ecoflap.progress import Task
from ecoflap.pruning.global_criteria import Scores


@dataclass(frozen=True)
class GlobalMagnitude:
    """score = |w|, the absolute value (Han et al. 2015, arXiv 1506.02626); reads no data.

    Memory above the model's: some copies of one matrix.
    """

    name: ClassVar[str] = "global-magnitude"

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """One round."""
        return (zeros,)

    def steps(self, batches: int) -> int:
        return 0

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """|w| in fp32; see :class:`ecoflap.pruning.global_criteria.GlobalCriterion`."""

        def magnitude(layer: Layer) -> Tensor:
            return context.model.get_parameter(layer.name).detach().float().abs()

        return magnitude
