"""Computes the order in which a local criterion removes a layer's weights, and the local error of each step.

SparseGPT updates the remaining weights, so the search uses the updated weights, not only masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecoflap.allocation.patterns import Compare, Unstructured
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.slices import stored_matrix
from ecoflap.pruning.criteria import Criterion
from ecoflap.pruning.masks import lowest_mask
from ecoflap.statistics.inputs import InputGram, InputStatistics

LEVELS = 50  # steps of a local curve: 2 % of a layer's weights each


@dataclass(frozen=True)
class Order:
    """Ranks the weights of all layers.

    Attributes:
        norms: norms of the input columns, (columns,) fp32, in the dense model by layer name; for a layer without them
            (no token reached it) all columns have equal weight.
        weighted: rank by |w|·‖x‖ (Wanda, arXiv 2306.11695), else by |w|.
        compare: rank within each output row, or over the whole matrix.

    SparseGPT's own order depends on the weights that it has updated already. Wanda's order can replace it (both agree
    for uncorrelated inputs), or :class:`ecoflap.search.order.Compensated` computes it in full.
    """

    norms: Mapping[str, Tensor]
    weighted: bool
    compare: Compare

    @classmethod
    def of(cls, statistics: Mapping[str, InputStatistics], *, needs: str, compare: Compare | None) -> Order:
        """The order of a criterion that ``needs`` these statistics ("none", "norm", "gram")."""
        norms = {name: found.norm for name, found in statistics.items()}
        weighted = needs != "none"
        return cls(norms, weighted, compare or ("row" if weighted else "matrix"))

    def mask(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """(out, in) bool, True = kept, with exactly ``zeros`` zeros."""
        weight = weight_of(model, layer).abs()
        scores = weight * self._norm(layer, weight) if self.weighted else weight
        return lowest_mask(scores, zeros, Unstructured(self.compare))

    def stand_in(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """The argument for :class:`~ecoflap.search.masked_model.MaskedModel`: here a mask, (out, in) bool."""
        return self.mask(model, layer, zeros)

    def errors(self, model: nn.Module, layer: Layer) -> Tensor:
        """Local error Σ (w·‖x‖)² over the weights removed, at the sparsities i / LEVELS.

        This is the squared error of the layer's outputs over the calibration tokens for uncorrelated inputs.

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
    weight = stored_matrix(model, layer.name)
    return (weight.t() if layer.transposed else weight).float()


def local_errors(model: nn.Module, anatomy: Anatomy, order: Order) -> dict[str, Tensor]:
    """:meth:`Order.errors` of every layer, by name."""
    return {layer.name: order.errors(model, layer) for layer in anatomy.layers}


@dataclass(frozen=True)
class Compensated(Order):
    """Prunes each layer by a criterion with a Hessian, on the dense model's statistics, whenever its sparsity changes.

    Keeps the Hessian and its factor for every distinct input, 8 bytes · columns² each, and one copy of the weights.
    Layers that no token reached use Wanda's order.
    """

    criterion: Criterion | None = None
    grams: Mapping[str, InputGram] | None = None
    damping: float = 0.01

    def stand_in(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """The pruned weight (out, in) in its dtype; a mask for a layer without statistics."""
        gram = (self.grams or {}).get(layer.name)
        if gram is None or self.criterion is None:
            return self.mask(model, layer, zeros)
        weight = stored_matrix(model, layer.name)
        weight = weight.t() if layer.transposed else weight
        return self.criterion(weight, gram, zeros, Unstructured(self.compare)).weight

    def errors(self, model: nn.Module, layer: Layer) -> Tensor:
        """As :meth:`Order.errors`, with SparseGPT's initial scores: (w / U_jj)², UᵀU = H⁻¹."""
        gram = (self.grams or {}).get(layer.name)
        if gram is None:
            return super().errors(model, layer)
        weight = weight_of(model, layer)
        scale = gram.inverse_factor(self.damping).diagonal().reciprocal().masked_fill(gram.dead, 0)
        costs = (weight * scale.to(weight.device)).square()
        return cumulated(costs if self.compare == "row" else costs.flatten()[None])


def compensated(
    statistics: Mapping[str, InputStatistics], criterion: Criterion, damping: float, compare: Compare | None
) -> Compensated:
    """The order of a criterion that needs Hessians; ``compare`` is the user's."""
    grams = {name: found for name, found in statistics.items() if isinstance(found, InputGram)}
    return Compensated(
        norms={name: gram.norm for name, gram in grams.items()},
        weighted=True,
        compare=compare or "matrix",
        criterion=criterion,
        grams=grams,
        damping=damping,
    )
