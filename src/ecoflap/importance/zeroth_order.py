"""Zeroth-order importance: the size of the loss gradient of each matrix, from forward passes alone.

Sung, Yoon, Bansal, "ECoFLaP", ICLR 2024 (arXiv 2310.02998), section 3.2; the estimator is that of MeZO (Malladi et al.
2023, arXiv 2305.17333) applied to one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.noise import noise
from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.network.parts import Layer
from ecoflap.network.perturb import swapped
from ecoflap.network.replay import Replay
from ecoflap.registry import unknown

PROBES = ("matrix", "block")


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
    """

    epsilon: float = 1e-3
    draws: int = 1
    replay: bool = True
    probe: str = "matrix"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidOption(f"epsilon must be a positive number, not {self.epsilon}")
        if self.draws < 1:
            raise InvalidOption(f"draws must be at least 1, not {self.draws}")
        if self.probe not in PROBES:
            raise unknown("probe", self.probe, list(PROBES))

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches) * self.draws

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """Signed projections g, batch by batch and unit by unit, without those in ``context.done``."""
        blocks = (block.layers for block in context.anatomy.blocks if block.layers)
        units = list(blocks) if self.probe == "block" else [(layer,) for layer in context.layers]
        with torch.no_grad(), Replay(context.model, context.blocks if self.replay else ()) as replay:
            for index in range(len(context.batches)):
                todo = [
                    (unit, draw)
                    for unit in units
                    for draw in range(self.draws)
                    if any((layer.name, index, draw) not in context.done for layer in unit)
                ]
                if not todo:
                    continue
                replay.reset()
                context.loss(index)  # records the blocks, and refuses a batch whose loss is not finite
                for unit, draw in todo:
                    projection = self._projection(context, replay, unit, index, draw)
                    total = sum(layer.numel for layer in unit)
                    for layer in unit:
                        if (layer.name, index, draw) not in context.done:
                            yield Estimate(layer.name, index, draw, projection * (layer.numel / total))

    def _projection(self, context: ProbeContext, replay: Replay, unit: Sequence[Layer], index: int, draw: int) -> float:
        """Of the gradient on the noise of all the unit's matrices."""
        weights = [context.model.get_parameter(layer.name).detach() for layer in unit]
        noises = [
            noise(weight.shape, weight.device, seed=context.seed, layer=layer.name, batch=index, draw=draw)
            for layer, weight in zip(unit, weights, strict=True)
        ]
        names = unit[0].name if len(unit) == 1 else unit[0].block
        forced = dict.fromkeys(block for layer in unit for block in context.blocks_of(layer))
        losses = []
        for step in (self.epsilon, -self.epsilon):
            with ExitStack() as swaps, replay.forcing(*forced):
                for layer, weight, z in zip(unit, weights, noises, strict=True):
                    perturbed = torch.add(weight, z.to(weight.dtype), alpha=step)
                    swaps.enter_context(swapped(context.model, layer.modules, perturbed))
                losses.append(context.loss(index, names))
        difference = losses[0] - losses[1]
        if not math.isfinite(difference):
            raise NonFiniteLoss(f"the loss difference of {names} on calibration batch {index} is {difference}")
        return difference / (2 * self.epsilon)
