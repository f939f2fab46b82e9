"""Importance by pruning: prunes single blocks at a few sparsities, and measures the change of the outputs.

Source: the idea of SPDY (Frantar and Alistarh 2022, arXiv 2201.13096) and EvoPress (Sieberling et al. 2024, arXiv
2410.14649), with forward passes of a masked model instead of a database of pruned layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ecoflap.allocation.curves import Curve
from ecoflap.errors import InvalidOption
from ecoflap.importance.base import ImportanceMeasure, Key, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.model.parts import Anatomy, Block
from ecoflap.model.replay import Replay
from ecoflap.search.divergence import METRICS, Divergence
from ecoflap.search.masked_model import MaskedModel
from ecoflap.search.order import Order
from ecoflap.support.registry import unknown

ORDERS = ("wanda", "magnitude")


@dataclass(frozen=True)
class Sensitivity(ImportanceMeasure):
    """Divergence of the outputs if only one block is pruned, at each level: a curve for every block.

    A score is the mean over levels and batches; a block's score is divided among its layers in proportion to their
    weights, so that only a block's sum has a meaning. The allocation uses the curves (rule ``curves``).

    Attributes:
        levels: sparsities to measure at, separated by commas.
        order: local criterion that makes the masks: ``wanda`` (also used for SparseGPT), or ``magnitude``.
        metric: ``kl``, ``loss`` or ``auto``, see :class:`ecoflap.search.divergence.Divergence`.
        precision: ``native``, the checkpoint's own, or ``fp32``; half precision is exact enough for the divergences.
    """

    levels: str = "0.3,0.5,0.7"
    order: str = "wanda"
    metric: str = "auto"
    precision: str = "native"

    rule: ClassVar[str] = "curves"
    noisy: ClassVar[bool] = False
    scope = "block"

    def __post_init__(self) -> None:
        for name, known in (("order", ORDERS), ("metric", METRICS), ("precision", ("native", "fp32"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), list(known))
        Curve(self.sparsities, (0.0,) * len(self.sparsities))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The levels as numbers. Raises InvalidOption."""
        try:
            return tuple(float(part) for part in str(self.levels).split(","))
        except ValueError as error:
            raise InvalidOption(
                f"levels {self.levels!r}: give sparsities separated by commas, such as 0.3,0.5,0.7"
            ) from error

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches) * len(self.sparsities)

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One piece per batch and block."""
        for index in range(len(context.batches)):
            for block in context.anatomy.blocks:
                if block.layers:
                    levels = range(len(self.sparsities))
                    yield tuple((layer.name, index, number) for number in levels for layer in block.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """Divergences, batch by batch and block by block; ``draw`` is the number of the level."""
        model, anatomy = context.model, context.anatomy
        todo = [index for index in range(len(context.batches)) if self._open(context, anatomy.blocks, index)]
        if not any(context.workers.gather(bool(todo))):  # workers without estimates to measure help with the statistics
            return
        statistics = context.input_norms()
        order = Order.of(statistics, needs="none" if self.order == "magnitude" else "norm", compare=None)
        divergence = Divergence(model, context.batches, context.objective, self.metric)
        divergence.record()
        context.remarks["measured"] = divergence.metric
        with torch.no_grad(), MaskedModel(model, anatomy) as masked, Replay(model, context.blocks) as replay:
            for index in todo:
                replay.reset()
                masked.clear()
                divergence.value(index)  # records the blocks
                for block in self._open(context, anatomy.blocks, index):
                    forced = dict.fromkeys(name for layer in block.layers for name in context.blocks_of(layer))
                    for number, level in enumerate(self.sparsities):
                        masked.set(
                            {layer: order.mask(model, layer, round(level * layer.numel)) for layer in block.layers}
                        )
                        with replay.forcing(*forced):
                            value = divergence.value(index)
                        for layer in block.layers:
                            if (layer.name, index, number) not in context.done:
                                yield Estimate(layer.name, index, number, value * layer.numel / block.numel)
                    masked.clear()

    def _open(self, context: ProbeContext, blocks: tuple[Block, ...], index: int) -> list[Block]:
        numbers = range(len(self.sparsities))
        return [
            block
            for block in blocks
            if any((layer.name, index, n) not in context.done for layer in block.layers for n in numbers)
        ]

    def curves(self, anatomy: Anatomy, known: Mapping[tuple[str, int, int], float]) -> dict[str, Curve]:
        """Curves by block name: at each level the mean over batches of the block's divergence.

        Args:
            known: estimates by (layer, batch, level).
        """
        block_of = {layer.name: layer.block for layer in anatomy.layers}
        batches = len({batch for _, batch, _ in known})
        sums = {block.name: [0.0] * len(self.sparsities) for block in anatomy.blocks if block.layers}
        for (layer, _, number), value in sorted(known.items()):
            sums[block_of[layer]][number] += value / batches
        return {name: Curve(self.sparsities, tuple(losses)) for name, losses in sums.items()}
