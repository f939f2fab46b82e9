"""What each part of a pruned model's weights costs it, all others being pruned as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.network.parts import Layer
from ecoflap.network.perturb import gradients_set_aside
from ecoflap.network.recompute import recomputing
from ecoflap.network.replay import Replay
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked import MaskedModel


def by_probes(
    masked: MaskedModel, replay: Replay, divergence: Divergence, units: Mapping[str, Sequence[Layer]]
) -> dict[str, float]:
    """For each unit of layers: the divergence less that with this unit dense and the rest pruned.

    Forward passes only: one a unit and batch, from the unit's first block on (what lies before is replayed).
    Interactions count: it is the loss that the unit's removed weights add to a model that has lost all the others.

    Returns:
        Unit to the mean over batches, in the divergence's unit; below 0 where the model is better off pruned.
    """
    costs = {name: [0.0] * len(divergence) for name in units}
    for index in range(len(divergence)):
        replay.reset()
        whole = divergence.value(index)
        for name, layers in units.items():
            names = [layer.name for layer in layers]
            forced = dict.fromkeys(block for layer in names for block in masked.blocks_of(layer))
            with masked.dense(names), replay.forcing(*forced):
                costs[name][index] = whole - divergence.value(index)
    replay.reset()
    return {name: math.fsum(values) / len(divergence) for name, values in costs.items()}


def by_gradient(
    model: nn.Module, masked: MaskedModel, divergence: Divergence, layers: Sequence[Layer], blocks: Sequence[str]
) -> dict[str, float]:
    """For each layer: ⟨∇L at the masked weights, masked - dense⟩, by one backward pass a batch.

    In a quadratic model that is the layer's part of twice the loss, interactions included; the parts add up to it. It
    is the end point of the path integral of Sundararajan et al. 2017 (arXiv 1703.01365) from dense to masked weights.
    Kept are the inputs of the blocks; the rest of each block is computed again in the backward pass.

    Raises:
        InvalidOption: the model can't be differentiated.
    """
    costs = {layer.name: [0.0] * len(divergence) for layer in layers}
    with gradients_set_aside(model), torch.enable_grad(), recomputing(model, blocks):
        model.requires_grad_(False)
        parts = {
            layer.name: torch.ones((), device=model.get_parameter(layer.name).device, requires_grad=True)
            for layer in layers
        }
        for index in range(len(divergence)):
            with masked.removed_part(parts):
                value = divergence(index)
                try:
                    found = torch.autograd.grad(value, list(parts.values()), allow_unused=True)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError) as error:
                    raise InvalidOption(
                        f"{type(model).__name__} can't be differentiated ({str(error).splitlines()[0]}): take by=probes"
                    ) from error
            for name, gradient in zip(parts, found, strict=True):
                costs[name][index] = 0.0 if gradient is None else float(gradient)
    return {name: math.fsum(values) / len(divergence) for name, values in costs.items()}
