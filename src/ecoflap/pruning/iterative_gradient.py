"""Iterative gradient pruning: rounds of first-order scores over the whole model, each round sparser than the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.gradients import visit_gradients
from ecoflap.importance.probe import ProbeContext
from ecoflap.network.fp32 import computing_in_fp32
from ecoflap.network.parts import Layer
from ecoflap.progress import Task
from ecoflap.pruning.global_criteria import Scores


@dataclass(frozen=True)
class IterativeGradient:
    """score = |w|·E|g|, measured anew in each of N rounds, of which round i makes the model p^(N/i) sparse.

    The baseline of Sung et al. 2024 (arXiv 2310.02998, section 4) that stands there as OBD, after LeCun et al. 1989. g
    is the gradient of one calibration batch's mean loss, E the mean over batches; both are taken in fp32, whatever the
    checkpoint's dtype. Weights that are zero stay zero: each round's zeros hold those of the round before.

    Memory: E|g| of every prunable weight at once, 4 bytes each (in the computer's memory with ``offload_activations``),
    beside the model in fp32, the inputs of its blocks, and the activations of one block, which are computed again in
    the backward pass as in :class:`~ecoflap.importance.first_order.FirstOrder`. Time: a forward, a second one and a
    backward pass for each batch and round.

    Attributes:
        rounds: N.
    """

    name: ClassVar[str] = "iterative-gradient"

    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InvalidOption(f"rounds must be at least 1, not {self.rounds}")

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """round(n·p^(N/i)) for i = 1 … N with p = zeros / n; the last is exact."""
        share = zeros / weights
        early = (round(weights * share ** (self.rounds / number)) for number in range(1, self.rounds))
        return (*(min(zeros, count) for count in early), zeros)

    def steps(self, batches: int) -> int:
        return batches

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """|w|·Σ|g| over the batches, which compares as |w|·E|g| does.

        Raises:
            InvalidOption: the model can't be differentiated.
            NonFiniteLoss: a loss is not finite.
        """
        device = torch.device("cpu") if offload else None
        sums = {
            layer.name: torch.zeros_like(
                context.model.get_parameter(layer.name), dtype=torch.float32, device=device, requires_grad=False
            )
            for layer in context.layers
        }

        def add(name: str, _: Tensor, gradient: Tensor) -> None:
            sums[name] += gradient.abs_().to(sums[name])

        with computing_in_fp32(context.model):
            for index in range(len(context.batches)):
                visit_gradients(context, index, add, instead="criterion 'global-magnitude' needs none")
                task.advance(1, f"gradients of batch {index + 1}")

        def score(layer: Layer) -> Tensor:
            weight = context.model.get_parameter(layer.name).detach()
            return weight.float().abs() * sums[layer.name].to(weight.device)

        return score
