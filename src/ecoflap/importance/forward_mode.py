"""Forward-mode importance: the size of each matrix's loss gradient, from directional derivatives along noise.

The score is that of the zeroth order (Sung, Yoon, Bansal, "ECoFLaP", ICLR 2024, arXiv 2310.02998, section 3.2), with
the difference of two losses replaced by the forward gradient of Baydin et al. 2022 (arXiv 2202.08587).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.autograd import forward_ad

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.base import ImportanceMeasure, Key, ProbeContext
from ecoflap.importance.projections import Probe, check_probes, probes, projections
from ecoflap.importance.scores import HALF_NORMAL_SPREAD, Estimate
from ecoflap.importance.zeroth_order import ZerothOrder
from ecoflap.model.parts import Anatomy, Layer, Tower
from ecoflap.model.patching import differentiable_attention, tangent_of, with_tangent
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.support.text import first_line

FALLBACK = "fallback"  # in the settings of an importance: towers whose scores are the zeroth order's, and why
_TRIALS = 3  # directions of noise for which derivatives are compared with differences of losses


@dataclass(frozen=True)
class ForwardMode(ImportanceMeasure):
    """g = ⟨z, ∇L⟩ with z ~ N(0, I) for each matrix alone, in one forward pass; the score is the mean of |g|.

    The noise is that of the zeroth order (same seed, layer, batch, draw: same z), and the result is the limit of its
    estimates for ε → 0: there is no step to choose, and no difference of two nearly equal losses. Activations after the
    matrix have a tangent of their own size, so a probe takes about twice the memory of a forward's activations;
    attention is computed by elementary operators, which store the attention matrix.

    If an operator has no forward mode, or silently drops the derivative, the towers before it are measured by the
    zeroth order, with a warning and an entry ``fallback`` in the settings. This is found by a trial on the first layer
    of each tower, which compares derivatives with differences of losses.

    Attributes:
        draws: number of noise directions for each (matrix, batch).
        replay: reuse the outputs of unchanged blocks; without, every probe is a whole forward with the same result.
        probe: ``matrix`` or ``block``, as in :class:`~ecoflap.importance.zeroth_order.ZerothOrder`.
        precision: ``fp32``, or ``native``: compute in the checkpoint's dtype, in half the memory for half precision.
            Rounding changes a derivative there far less than a difference of losses.
    """

    scatter: ClassVar[float | None] = HALF_NORMAL_SPREAD

    draws: int = 1
    replay: bool = True
    probe: str = "matrix"
    precision: str = "fp32"

    def __post_init__(self) -> None:
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
        with torch.no_grad(), differentiable_attention():
            trial = _Trial(context, self.precision)
            towers = {tower.name: reason for tower in context.anatomy.towers if (reason := trial.obstacle(tower))}
            if towers:
                _tell(towers)
                context.remarks[FALLBACK] = {"importance": "zeroth-order", "towers": towers}
            by_difference = ZerothOrder(draws=self.draws, replay=self.replay, probe=self.probe)

            def project(probe: Probe, replay: Replay) -> float:
                if probe.unit[0].tower in towers:
                    return by_difference.projection(probe, replay)
                return self._projection(probe, replay)

            yield from projections(context, project, draws=self.draws, probe=self.probe, replay=self.replay)

    def _projection(self, probe: Probe, replay: Replay) -> float:
        """The projection of the gradient on the noise of all matrices of the unit."""
        try:
            return derivative(probe, replay)
        except NotImplementedError as error:
            raise InvalidOption(
                f"no forward-mode derivative of {probe.name} ({first_line(error)}): --importance zeroth-order needs "
                "none"
            ) from error


def derivative(probe: Probe, replay: Replay) -> float:
    """⟨z, ∇L⟩ for the probe's noise, by one forward pass with dual tensors; 0 if the loss does not depend on it.

    Raises:
        NotImplementedError: an operator has no forward mode.
        NonFiniteLoss: the loss or its derivative is not finite.
    """
    with forward_ad.dual_level():
        pairs = zip(probe.weights(), probe.noises(), strict=True)
        duals = [with_tangent(weight, z) for weight, z in pairs]
        with probe.using(duals, replay):
            loss = probe.context.loss_tensor(probe.batch, probe.name)
        tangent = tangent_of(loss)
        value = 0.0 if tangent is None else float(tangent)
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the loss derivative of {probe.name} on calibration batch {probe.batch} is {value}", probe.batch
        )
    return value


@dataclass
class _Trial:
    """Tests on the first batch which towers forward mode works for."""

    context: ProbeContext
    precision: str
    difference: ZerothOrder = field(default_factory=ZerothOrder)

    def obstacle(self, tower: Tower) -> str:
        """Why forward mode can't be used for a tower; "" if it can.

        Tries the first layer, because its output passes through all later operators.
        """
        layer = next(iter(tower.layers))
        with Replay(self.context.model, self.context.blocks) as replay:
            self.context.loss(0)
            try:
                found = [derivative(self._probe(layer, draw), replay) for draw in range(_TRIALS)]
            except NotImplementedError as error:
                return first_line(error)
            if self.precision == "native" and stored_matrix(self.context.model, layer.name).dtype.itemsize < 4:
                return ""  # a difference of losses in half precision is too inexact for a comparison
            expected = [self.difference.projection(self._probe(layer, draw), replay) for draw in range(_TRIALS)]
            rounding = torch.finfo(torch.float32).eps * abs(self.context.loss(0)) / self.difference.epsilon
        off = sum(abs(one - other) for one, other in zip(found, expected, strict=True))
        size = sum(max(abs(one), abs(other)) for one, other in zip(found, expected, strict=True))
        if off > size / 2 + 10 * _TRIALS * rounding:
            return "an operator drops the derivative without an error"
        return ""

    def _probe(self, layer: Layer, draw: int) -> Probe:
        return Probe(self.context, (layer,), 0, draw)


def _tell(towers: dict[str, str]) -> None:
    reasons = "; ".join(dict.fromkeys(towers.values()))
    warnings.warn(
        f"forward mode does not work for {', '.join(towers)} ({reasons}): zeroth-order importance is taken there",
        stacklevel=2,
    )
