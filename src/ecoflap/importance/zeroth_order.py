"""Zeroth-order importance: the size of the loss gradient of each matrix, from forward passes alone.

Sung, Yoon, Bansal, "ECoFLaP", ICLR 2024 (arXiv 2310.02998), section 3.2; the estimator is that of MeZO (Malladi et al.
2023, arXiv 2305.17333) applied to one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.probe import Key, ProbeContext
from ecoflap.importance.projections import Probe, check_probes, efforts, probes, projections
from ecoflap.importance.rounding import tell_rounding
from ecoflap.importance.scores import HALF_NORMAL_SPREAD, Estimate
from ecoflap.network.parts import Anatomy
from ecoflap.network.replay import Replay


@dataclass(frozen=True)
class ZerothOrder:
    """g = (L(W + εz) − L(W − εz)) / 2ε for each matrix alone; the score is the mean of |g| over batches and draws.

    As g → ⟨z, ∇L⟩ with z ~ N(0, I), E|g| = √(2/π)·‖∇L‖₂, and one estimate scatters by 76 % of its mean.

    Attributes:
        epsilon: ε, the step along the noise, in units of the weights.
        draws: noises a (matrix, batch).
        replay: answer unchanged blocks from memory; off, every probe is two whole forwards with the same result.
        probe: ``matrix`` perturbs one matrix at a time; ``block`` all matrices of a block at once, each with its own
            noise. That takes as many probes as there are blocks, and estimates √(2/π)·(Σ‖∇L‖²)^½ over the block's
            matrices; each of them is given its part by its number of weights, so only the block's sum has a meaning.
        precision: ``fp32``, or ``native``: compute in the checkpoint's dtype. Of half precision little is left in a
            difference of losses; how little is measured, told in a warning, and kept as ``rounding`` in the settings.
    """

    scatter: ClassVar[float] = HALF_NORMAL_SPREAD

    epsilon: float = 1e-3
    draws: int = 1
    replay: bool = True
    probe: str = "matrix"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidOption(f"epsilon must be a positive number, not {self.epsilon}")
        check_probes(self.draws, self.probe, self.precision)

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Weights are fp32 while their block runs."""
        return anatomy.replayable

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches) * self.draws

    def efforts(self, context: ProbeContext) -> list[float]:
        """Of the estimates to come, in any unit: for the time left."""
        return efforts(context, draws=self.draws, probe=self.probe, replay=self.replay, losses=2)

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One a probe."""
        return probes(context, draws=self.draws, probe=self.probe)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """Signed projections g, batch by batch and unit by unit, without those in ``context.done``."""
        if self.precision == "native":
            tell_rounding(context, self._stepping, self.epsilon)
        return projections(context, self.projection, draws=self.draws, probe=self.probe, replay=self.replay)

    def projection(self, probe: Probe, replay: Replay) -> float:
        """Of the gradient on the noise of all the unit's matrices."""
        return self._stepping(probe, replay, self.epsilon)

    def _stepping(self, probe: Probe, replay: Replay, epsilon: float) -> float:
        weights, noises = probe.weights(), probe.noises()
        losses = []
        for step in (epsilon, -epsilon):
            perturbed = [torch.add(weight, z, alpha=step) for weight, z in zip(weights, noises, strict=True)]
            with probe.using(perturbed, replay):
                losses.append(probe.context.loss(probe.batch, probe.name))
        difference = losses[0] - losses[1]
        if not math.isfinite(difference):
            raise NonFiniteLoss(
                f"the loss difference of {probe.name} on calibration batch {probe.batch} is {difference}", probe.batch
            )
        return difference / (2 * epsilon)
