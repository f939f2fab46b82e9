"""Zeroth-order importance: the size of each matrix's loss gradient, from forward passes only.

Sung, Yoon, Bansal, "ECoFLaP", ICLR 2024 (arXiv 2310.02998), section 3.2; the estimator is that of MeZO (Malladi et al.
2023, arXiv 2305.17333) applied to one matrix at a time. The rounding error of the estimates is measured on the model,
with a warning if it is large.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.base import ImportanceMeasure, Key, ProbeContext
from ecoflap.importance.projections import Probe, check_probes, probes, projections
from ecoflap.importance.scores import HALF_NORMAL_SPREAD, Estimate
from ecoflap.model.parts import Anatomy
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.support.ranges import check_positive

TRIALS = 8  # matrices, evenly spread
ROUNDING = "rounding"  # in the settings of an importance: what :func:`rounding_share` found
Projection = Callable[[Probe, Replay, float], float]


def rounding_share(context: ProbeContext, project: Projection, epsilon: float) -> float:
    """Root mean square of the rounding error divided by that of the estimate; 0 if all estimates are 0.

    A few matrices are probed along the same noise with the steps ε and 2ε. Both give the same derivative up to O(ε²).
    The rounding error of a difference of losses is σ for one and σ/2 for the other, so they differ by σ·√(5/4).

    Args:
        project: an estimate along a probe's noise, with a given step.
        epsilon: ε.
    """
    step = max(1, len(context.layers) // TRIALS)
    found = []
    with torch.no_grad(), Replay(context.model, context.blocks) as replay:
        context.loss(0)
        for layer in context.layers[step // 2 :: step][:TRIALS]:
            probe = Probe(context, (layer,), 0, 0)
            found.append((project(probe, replay, epsilon), project(probe, replay, 2 * epsilon)))
    size = math.fsum(one**2 for one, _ in found)
    error = math.fsum((one - other) ** 2 for one, other in found) / 1.25
    return math.sqrt(error / size) if size else 0.0


def report_rounding(context: ProbeContext, project: Projection, epsilon: float) -> None:
    """Measure the rounding error, add it to the remarks, and warn; does nothing for a model that computes in fp32."""
    kinds = {stored_matrix(context.model, layer.name).dtype for layer in context.layers}
    if all(kind.itemsize >= 4 for kind in kinds) or ROUNDING in context.remarks:
        return
    share = rounding_share(context, project, epsilon)
    context.remarks[ROUNDING] = share
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    warnings.warn(
        f"zeroth order in {names}: on this model rounding is {share:.0%} of the size of an estimate ({TRIALS} probes "
        "with two steps each); leave out precision=native, or take forward-mode, which subtracts no losses",
        stacklevel=2,
    )


@dataclass(frozen=True)
class ZerothOrder(ImportanceMeasure):
    """g = (L(W + εz) − L(W − εz)) / 2ε for each matrix alone; the score is the mean of |g| over batches and draws.

    As g → ⟨z, ∇L⟩ with z ~ N(0, I), E|g| = √(2/π)·‖∇L‖₂, and one estimate scatters by 76 % of its mean.

    Attributes:
        epsilon: ε, the step along the noise, in units of the weights.
        draws: number of noise directions for each (matrix, batch).
        replay: reuse the outputs of unchanged blocks; without, every probe is two whole forwards with the same result.
        probe: ``matrix`` perturbs one matrix at a time; ``block`` all matrices of a block at once, each with its own
            noise. That takes one probe for each block, and estimates √(2/π)·(Σ‖∇L‖²)^½ over the block's matrices. The
            value is divided among them in proportion to their weights, so that only a block's sum has a meaning.
        precision: ``fp32``, or ``native``: compute in the checkpoint's dtype. In half precision a difference of losses
            is mostly rounding; its share is measured, reported in a warning, and saved as ``rounding`` in the settings.
    """

    scatter: ClassVar[float | None] = HALF_NORMAL_SPREAD

    epsilon: float = 1e-3
    draws: int = 1
    replay: bool = True
    probe: str = "matrix"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        check_probes(self.draws, self.probe, self.precision)

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Weights are fp32 while their block runs."""
        return anatomy.replayable

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches) * self.draws

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One piece per probe."""
        return probes(context, draws=self.draws, probe=self.probe)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """Signed projections g, batch by batch and unit by unit, without those in ``context.done``."""
        if self.precision == "native":
            report_rounding(context, self._stepping, self.epsilon)
        return projections(context, self.projection, draws=self.draws, probe=self.probe, replay=self.replay)

    def projection(self, probe: Probe, replay: Replay) -> float:
        """The projection of the gradient on the noise of all matrices of the unit."""
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
