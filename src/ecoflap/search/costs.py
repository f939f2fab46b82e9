"""Measures the cost of each part's pruned weights, while all other parts stay pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.model.parts import Layer
from ecoflap.model.patching import gradients_set_aside
from ecoflap.model.recompute import recomputing
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel
from ecoflap.support.memory import memory_error


def by_probes(
    masked: MaskedModel, replay: Replay, divergence: Divergence, units: Mapping[str, Sequence[Layer]]
) -> dict[str, float]:
    """For each unit of layers: the divergence minus the divergence with this unit dense and the rest pruned.

    Needs only forward passes: one for each unit and batch, from the unit's first block on (earlier blocks are
    replayed). Interactions are included: this is the loss that the unit's pruning adds to that of all others.

    Returns:
        By unit, the mean over batches, in the divergence's unit; negative if pruning the unit helps.
    """

    def of_batch(index: int) -> list[float]:
        replay.reset()
        whole, costs = divergence.value(index), []
        for layers in units.values():
            names = [layer.name for layer in layers]
            forced = dict.fromkeys(block for layer in names for block in masked.blocks_of(layer))
            with masked.dense(names), replay.forcing(*forced):
                costs.append(whole - divergence.value(index))
        return costs

    found = divergence.each(of_batch)
    replay.reset()
    return _means(list(units), found)


def by_gradient(
    model: nn.Module, masked: MaskedModel, divergence: Divergence, layers: Sequence[Layer], blocks: Sequence[str]
) -> dict[str, float]:
    """For each layer: ⟨∇L at the masked weights, masked - dense⟩, by one backward pass per batch.

    For a quadratic loss this is the layer's part of twice the loss, with interactions; the parts sum to it. It is the
    end point of the path integral of Sundararajan et al. 2017 (arXiv 1703.01365) from dense to masked weights. Only the
    inputs of the blocks are stored; the backward pass recomputes each block.

    Raises:
        InvalidOption: the model can't be differentiated.
    """
    with gradients_set_aside(model), torch.enable_grad(), recomputing(model, blocks):
        model.requires_grad_(False)
        parts = {
            layer.name: torch.ones((), device=stored_matrix(model, layer.name).device, requires_grad=True)
            for layer in layers
        }

        def of_batch(index: int) -> list[float]:
            with masked.removed_part(parts):
                value = divergence(index)
                try:
                    found = torch.autograd.grad(value, list(parts.values()), allow_unused=True)
                except (RuntimeError, NotImplementedError) as error:
                    if memory_error(error) is not None:
                        raise
                    raise InvalidOption(
                        f"{type(model).__name__} can't be differentiated ({str(error).splitlines()[0]}): take by=probes"
                    ) from error
            return [0.0 if gradient is None else float(gradient) for gradient in found]

        return _means(list(parts), divergence.each(of_batch))


def _means(names: Sequence[str], of_batches: Sequence[Sequence[float]]) -> dict[str, float]:
    """By name, the mean over batches of its values; each batch has one value per name, in the order of the names."""
    columns = zip(*of_batches, strict=True)
    return {name: math.fsum(values) / len(of_batches) for name, values in zip(names, columns, strict=True)}
