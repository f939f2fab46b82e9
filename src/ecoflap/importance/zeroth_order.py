"""Zeroth-order importance: the size of the loss gradient of each matrix, from forward passes alone.

Sung, Yoon, Bansal, "ECoFLaP", ICLR 2024 (arXiv 2310.02998), section 3.2; the estimator is that of MeZO (Malladi et al.
2023, arXiv 2305.17333) applied to one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.noise import noise
from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.network.parts import Layer
from ecoflap.network.perturb import swapped
from ecoflap.network.replay import Replay


@dataclass(frozen=True)
class ZerothOrder:
    """g = (L(W + εz) − L(W − εz)) / 2ε for each matrix alone; the score is the mean of |g| over batches and draws.

    As g → ⟨z, ∇L⟩ with z ~ N(0, I), E|g| = √(2/π)·‖∇L‖₂, and one estimate scatters by 76 % of its mean.

    Attributes:
        epsilon: ε, the step along the noise, in units of the weights.
        draws: noises a (matrix, batch).
        replay: answer unchanged blocks from memory; off, every probe is two whole forwards with the same result.
    """

    epsilon: float = 1e-3
    draws: int = 1
    replay: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidOption(f"epsilon must be a positive number, not {self.epsilon}")
        if self.draws < 1:
            raise InvalidOption(f"draws must be at least 1, not {self.draws}")

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches) * self.draws

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """Signed projections g, batch by batch and layer by layer, without those in ``context.done``."""
        layers = context.layers
        with torch.no_grad(), Replay(context.model, context.blocks if self.replay else ()) as replay:
            for index in range(len(context.batches)):
                todo = [
                    (layer, draw)
                    for layer in layers
                    for draw in range(self.draws)
                    if (layer.name, index, draw) not in context.done
                ]
                if not todo:
                    continue
                replay.reset()
                context.loss(index)  # records the blocks, and refuses a batch whose loss is not finite
                for layer, draw in todo:
                    yield Estimate(layer.name, index, draw, self._projection(context, replay, layer, index, draw))

    def _projection(self, context: ProbeContext, replay: Replay, layer: Layer, index: int, draw: int) -> float:
        weight = context.model.get_parameter(layer.name)
        z = noise(weight.shape, weight.device, seed=context.seed, layer=layer.name, batch=index, draw=draw)
        losses = []
        for step in (self.epsilon, -self.epsilon):
            perturbed = torch.add(weight.detach(), z.to(weight.dtype), alpha=step)
            with swapped(context.model, layer.modules, perturbed), replay.forcing(*context.blocks_of(layer)):
                losses.append(context.loss(index, layer.name))
        difference = losses[0] - losses[1]
        if not math.isfinite(difference):
            raise NonFiniteLoss(f"the loss difference of {layer.name} on calibration batch {index} is {difference}")
        return difference / (2 * self.epsilon)
