"""SparseGPT's own weights in the search: what remains makes up for what goes, so masks alone would mislead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ecoflap.network.parts import Layer
from ecoflap.pruning.criteria import Criterion
from ecoflap.pruning.patterns import Compare, Unstructured
from ecoflap.search.order import Order, cumulated, weight_of
from ecoflap.statistics.inputs import InputGram, InputStatistics


@dataclass(frozen=True)
class Compensated(Order):
    """Prunes each layer by a criterion with a Hessian, on the dense model's statistics, whenever its share changes.

    Kept are the Hessian and its factor of every distinct input, 8 bytes · columns² each, and by the searched model one
    copy of the weights. Layers that no token reached go by Wanda's order.
    """

    criterion: Criterion | None = None
    grams: Mapping[str, InputGram] | None = None
    damping: float = 0.01

    def stand_in(self, model: nn.Module, layer: Layer, zeros: int) -> Tensor:
        """(out, in): the pruned weight itself, in its dtype; a mask for a layer without statistics."""
        gram = (self.grams or {}).get(layer.name)
        if gram is None or self.criterion is None:
            return self.mask(model, layer, zeros)
        weight = model.get_parameter(layer.name).detach()
        weight = weight.t() if layer.transposed else weight
        return self.criterion(weight, gram, zeros, Unstructured(self.compare)).weight

    def errors(self, model: nn.Module, layer: Layer) -> Tensor:
        """As of :class:`Order`, of the scores that SparseGPT starts with: (w / U_jj)², UᵀU = H⁻¹."""
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
    """For a criterion that needs Hessians; ``compare`` as the user says it."""
    grams = {name: found for name, found in statistics.items() if isinstance(found, InputGram)}
    return Compensated(
        norms={name: gram.norm for name, gram in grams.items()},
        weighted=True,
        compare=compare or "matrix",
        criterion=criterion,
        grams=grams,
        damping=damping,
    )
