"""Prunes the model of a search to any number of zeros in each layer, and measures it.

The order of removal comes from inputs in the dense model, or in one that is pruned up to each block, as in stage 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ecoflap.model.block_runner import Run
from ecoflap.model.parts import Anatomy, Block
from ecoflap.model.replay import Replay
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel
from ecoflap.search.order import Order, local_errors
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.dense import SharedNorms, dense_statistics
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.support.workers import ALONE, Workers


@dataclass(frozen=True)
class Orders:
    """Gathers statistics, and makes orders from them.

    Attributes:
        batches: calibration batches, those of stage 2.
        run: runs the model on one of them.
        kind: of statistics, "norm" or "gram".
        make: makes an order from statistics by layer name; layers that no token reached are missing.
        tokens: which tokens count.
        workers: processes with the same model and batches.
        norms: input norms that searches on the same batches share.
    """

    model: nn.Module
    anatomy: Anatomy
    batches: Sequence[Any]
    run: Run
    kind: str
    make: Callable[[Mapping[str, InputStatistics]], Order]
    tokens: TokenChoice = ALL
    workers: Workers = ALONE
    norms: SharedNorms = field(default_factory=SharedNorms)

    def dense(self) -> Order:
        """The order by the inputs in the dense model.

        Raises:
            NonFiniteLoss: an input is NaN or infinite.
        """
        if self.kind == "norm":  # Hessians are too large to be shared
            return self.make(self.norms.of(("own", self.tokens, len(self.batches)), self._gathered))
        return self.make(self._gathered())

    def _gathered(self) -> dict[str, InputStatistics]:
        every: dict[str, InputStatistics] = {}
        for _, found in self._blocks(changing=False):
            every.update(found)
        return every

    def along(self, zeros: Mapping[str, int], masked: MaskedModel) -> Order:
        """The order by the inputs in the model pruned to ``zeros``; afterwards ``masked`` has these masks.

        As in the walk of stage 2, each block is pruned as soon as its statistics are complete, and the next one gets
        its pruned outputs, but no weight is changed.

        Raises:
            NonFiniteLoss: an input is NaN or infinite.
        """
        masked.clear()
        every: dict[str, InputStatistics] = {}
        for block, found in self._blocks(changing=True):
            order = self.make(found)
            masked.set({layer: order.stand_in(self.model, layer, zeros[layer.name]) for layer in block.layers})
            every.update(found)
        return self.make(every)

    def _blocks(self, changing: bool) -> Iterator[tuple[Block, dict[str, InputStatistics]]]:
        blocks = dense_statistics(
            self.model, self.anatomy, self.batches, self.run, kind=self.kind, tokens=self.tokens,
            workers=self.workers, changing=changing,
        )  # fmt: skip
        for block, statistics in blocks:
            yield block, {name: got for name, got in statistics.items() if got is not None}


@dataclass
class PrunedModel:
    """Runs the model pruned to an allocation, without changing its weights.

    Attributes:
        orders: the order in which the criterion removes weights; or, if it depends on inputs, :class:`Orders`.
        order: the current one; None before :meth:`by_dense` or a walk.
    """

    model: nn.Module
    anatomy: Anatomy
    orders: Order | Orders
    divergence: Divergence
    masked: MaskedModel
    replay: Replay
    order: Order | None = None
    _at: Mapping[str, int] | None = None  # where the order was found; None: in the dense model
    _zeros: Mapping[str, int] | None = None  # of the model, by the current order
    _errors: Mapping[str, Tensor] | None = None  # by the current order

    @property
    def errors(self) -> Mapping[str, Tensor]:
        """Local errors of each layer by the current order, see :meth:`ecoflap.search.order.Order.errors`.

        Computed on request, since a walk that only measures a loss does not need them.
        """
        if self._errors is None:
            assert self.order is not None
            self._errors = local_errors(self.model, self.anatomy, self.order)
        return self._errors

    def by_dense(self) -> None:
        """Use the order of the dense model from now on."""
        if self.order is None:
            self._order_is(self.orders if isinstance(self.orders, Order) else self.orders.dense())

    def prune(self, zeros: Mapping[str, int], *, walking: bool) -> None:
        """Set ``zeros`` zeros in each layer, by the current order, or with ``walking`` by a walk, whose order becomes
        the current one."""
        if walking:
            self._walk(zeros)
        if zeros != self._zeros:
            self._zeros = zeros
            assert self.order is not None
            self.masked.set(
                {layer: self.order.stand_in(self.model, layer, zeros[layer.name]) for layer in self.anatomy.layers}
            )

    def measure(self, zeros: Mapping[str, int], *, walking: bool) -> float:
        """The mean divergence over the batches with ``zeros``; arguments as in :meth:`prune`."""
        self.prune(zeros, walking=walking)

        def value(index: int) -> float:
            self.replay.reset()  # its recording is of another batch or other masks
            return self.divergence.value(index)

        values = self.divergence.each(value)
        return math.fsum(values) / len(values)

    def _walk(self, zeros: Mapping[str, int]) -> None:
        if isinstance(self.orders, Order):  # independent of inputs
            self.by_dense()
        elif zeros != self._at:
            self.order = None  # free the old Hessians before new ones are gathered
            with self.replay.forcing(*self.anatomy.replayable):
                self._order_is(self.orders.along(zeros, self.masked))
            self._zeros = self._at = zeros

    def _order_is(self, order: Order) -> None:
        self.order, self._zeros, self._errors = order, None, None
