"""The searched model: pruned to any number of zeros a layer, by the dense model's order or a walk's, and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ecoflap.network.parts import Anatomy
from ecoflap.network.replay import Replay
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked import MaskedModel
from ecoflap.search.order import Order, local_errors
from ecoflap.search.orders import Orders


@dataclass
class PrunedModel:
    """Computes with the weights that an allocation leaves. The weights themselves stay.

    Attributes:
        orders: in which the criterion removes weights; or what finds it, where it depends on inputs.
        order: the present one; None before :meth:`by_dense` or a walk.
    """

    model: nn.Module
    anatomy: Anatomy
    orders: Order | Orders
    divergence: Divergence
    masked: MaskedModel
    replay: Replay
    order: Order | None = None
    _at: Mapping[str, int] | None = None  # where the order was found; None: in the dense model
    _zeros: Mapping[str, int] | None = None  # what the model computes with, by the present order
    _errors: Mapping[str, Tensor] | None = None  # by the present order

    @property
    def errors(self) -> Mapping[str, Tensor]:
        """Of each layer, by the present order: see :meth:`ecoflap.search.order.Order.errors`.

        Found when they are asked for: of a walk that only a loss is wanted of, nobody does.
        """
        if self._errors is None:
            assert self.order is not None
            self._errors = local_errors(self.model, self.anatomy, self.order)
        return self._errors

    def by_dense(self) -> None:
        """From here on the order is that of the dense model."""
        if self.order is None:
            self._order_is(self.orders if isinstance(self.orders, Order) else self.orders.dense())

    def prune(self, zeros: Mapping[str, int], *, walking: bool) -> None:
        """Compute with ``zeros`` zeros in each layer: after a walk to there, whose order is then the present one, or by
        the present order."""
        if walking:
            self._walk(zeros)
        if zeros != self._zeros:
            self._zeros = zeros
            assert self.order is not None
            self.masked.set(
                {layer: self.order.stand_in(self.model, layer, zeros[layer.name]) for layer in self.anatomy.layers}
            )

    def measure(self, zeros: Mapping[str, int], *, walking: bool) -> float:
        """The divergence at ``zeros``, mean over the batches; arguments as of :meth:`prune`."""
        self.prune(zeros, walking=walking)

        def value(index: int) -> float:
            self.replay.reset()  # its memory is of one batch, and of other masks
            return self.divergence.value(index)

        values = self.divergence.each(value)
        return math.fsum(values) / len(values)

    def _walk(self, zeros: Mapping[str, int]) -> None:
        if isinstance(self.orders, Order):  # that no input decides
            self.by_dense()
        elif zeros != self._at:
            self.order = None  # Hessians are large: two sets of them need not exist at once
            with self.replay.forcing(*self.anatomy.replayable):
                self._order_is(self.orders.along(zeros, self.masked))
            self._zeros = self._at = zeros

    def _order_is(self, order: Order) -> None:
        self.order, self._zeros, self._errors = order, None, None
