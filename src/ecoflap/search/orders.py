"""Where the order of removal comes from: the dense model, or one that is pruned up to each block, as in stage 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ecoflap.network.drive import Run
from ecoflap.network.parts import Anatomy, Block
from ecoflap.search.masked import MaskedModel
from ecoflap.search.order import Order
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.dense import SharedNorms, dense_statistics
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.workers import ALONE, Workers


@dataclass(frozen=True)
class Orders:
    """Gathers statistics, and makes orders of them.

    Attributes:
        batches: calibration batches, those of stage 2.
        run: runs the model on one of them.
        kind: of statistics, "norm" or "gram".
        make: the order that statistics give, by layer name; layers that no token reached have none.
        tokens: which tokens count.
        workers: those who have model and batches alike.
        norms: what other searches on the same batches have gathered.
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
        """By the inputs that layers get in the dense model.

        Raises:
            NonFiniteLoss: an input is NaN or infinite.
        """
        if self.kind == "norm":  # Hessians are too large to be kept for others
            return self.make(self.norms.of(("own", self.tokens, len(self.batches)), self._gathered))
        return self.make(self._gathered())

    def _gathered(self) -> dict[str, InputStatistics]:
        every: dict[str, InputStatistics] = {}
        for _, found in self._blocks(changing=False):
            every.update(found)
        return every

    def along(self, zeros: Mapping[str, int], masked: MaskedModel) -> Order:
        """By the inputs in the model pruned to ``zeros`` of each layer, with which ``masked`` computes afterwards.

        Each block is pruned as soon as its statistics are there, and the next one sees what it makes of its inputs:
        the walk of stage 2, except that no weight changes.

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
