"""The order in which a local criterion removes a layer's weights, and the local error that this makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecoflap.network.parts import Anatomy, Layer
from ecoflap.pruning.patterns import Compare, Unstructured, lowest_mask
from ecoflap.statistics.inputs import InputStatistics

LEVELS = 50  # steps of a local curve: 2 % of a layer's weights each


@dataclass(frozen=True)
class Order:
    """How the weights of all layers are ranked.

    Attributes:
        norms: layer name to the norm of each input column, (columns,) fp32, of the dense model; a layer without one
            (no token reached it) counts all columns alike.
        weighted: rank by |w|·‖x‖ (Wanda, arXiv 2306.11695), else by |w| alone.
        compare: rank within each output row, or over the whole matrix.

    SparseGPT's own order depends on the weights it has updated already; Wanda's may stand in for it (the two agree
    where the inputs are uncorrelated), or :class:`ecoflap.search.compensated.Compensated` does it in full.
    """

    norms: Mapping[str, Tensor]
    weighted: bool
    compare: Compare

    @classmethod
    def of(cls, statistics: Mapping[str, InputStatistics], *, needs: str, compare: Compare | None) -> Order:
        """For a criterion that ``needs`` these statistics ("none", "norm", "gram"), in the user's ``compare``."""
        norms = {name: found.norm for name, found in statistics.items()}
        weighted = needs != "none"
        return cls(norms, weighted, compare or ("row" if weighted else "matrix"))

    def mask(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """(out, in) bool, True = kept, with exactly ``zeros`` zeros."""
        weight = weight_of(model, layer).abs()
        scores = weight * self._norm(layer, weight) if self.weighted else weight
        return lowest_mask(scores, zeros, Unstructured(self.compare))

    def stand_in(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """What :class:`~ecoflap.search.masked.MaskedModel` computes with: a mask here, (out, in) bool."""
        return self.mask(model, layer, zeros)

    def errors(self, model: nn.Module, layer: Layer) -> Tensor:
        """Local error Σ (w·‖x‖)² over the weights removed, at the sparsities i / LEVELS.

        That is the squared error of the layer's outputs over the calibration tokens if its inputs were uncorrelated.

        Returns:
            (LEVELS + 1,) fp64 on the CPU, ascending from 0.
        """
        weight = weight_of(model, layer).abs()
        norm = self._norm(layer, weight)
        costs = (weight * norm).square()
        if self.weighted:
            ordered = costs.sort(dim=1).values if self.compare == "row" else costs.flatten().sort().values[None]
        else:
            by = weight if self.compare == "row" else weight.flatten()[None]
            ordered = costs.reshape(by.shape).gather(1, by.argsort(dim=1, stable=True))
        return _at_levels(ordered)

    def _norm(self, layer: Layer, like: Tensor) -> Tensor:
        norm = self.norms.get(layer.name)
        return like.new_ones(layer.shape[1]) if norm is None else norm.to(like.device)


def cumulated(costs: Tensor) -> Tensor:
    """Sums of the lowest ``costs`` of every row of (rows, n), at the levels: (LEVELS + 1,) fp64 on the CPU."""
    return _at_levels(costs.sort(dim=1).values)


def _at_levels(ordered: Tensor) -> Tensor:
    total = torch.cat([ordered.new_zeros(1, dtype=torch.float64), ordered.double().sum(dim=0).cumsum(0)])
    places = torch.arange(LEVELS + 1, dtype=torch.float64) * (ordered.shape[1] / LEVELS)
    return total.cpu()[places.round().long()]


def weight_of(model: nn.Module, layer: Layer) -> Tensor:
    """A layer's weight, (out, in) fp32."""
    weight = model.get_parameter(layer.name).detach()
    return (weight.t() if layer.transposed else weight).float()


def local_errors(model: nn.Module, anatomy: Anatomy, order: Order) -> dict[str, Tensor]:
    """:meth:`Order.errors` of every layer, by name."""
    return {layer.name: order.errors(model, layer) for layer in anatomy.layers}
