"""How long parts of the work take in proportion, counted in products of weights with inputs: for the time left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ecoflap.model.parts import Anatomy, Block


def forward_effort(anatomy: Anatomy) -> float:
    """Of one forward of one batch; 1 where no forward was watched."""
    return float(sum(anatomy.products.values())) or 1.0


def suffix_efforts(anatomy: Anatomy) -> dict[str, float]:
    """Of a forward that is replayed up to each block: that block, all called after it, and what is in no block."""
    if not anatomy.products:
        return dict.fromkeys(anatomy.replayable, 1.0)
    reverse = list(reversed(anatomy.replayable))
    sums = accumulate(anatomy.products.get(name, 0) for name in reverse)
    return {name: float(total + anatomy.products.get("", 0)) for name, total in zip(reverse, sums, strict=True)}


def walk_efforts(anatomy: Anatomy, todo: Sequence[Block], batches: int, gram: bool) -> list[float]:
    """Of pruning each block of ``todo``: its statistics, and its outputs for the next one; all that comes before a
    tower, where the walk enters it.

    Args:
        gram: the criterion reads second moments, with their products and factorisations (SparseGPT).
    """
    place = {name: number for number, name in enumerate(anatomy.replayable)}
    order = [anatomy.products.get(name, 0) for name in anatomy.replayable]
    before = dict(zip(anatomy.replayable, accumulate(order, initial=0), strict=False))
    efforts, towers = [], set[str]()
    for block in todo:
        products = anatomy.products.get(block.name, 0) if block.name in place else 0
        effort = float(2 * products * batches or block.numel)
        if gram:
            tokens = products * batches / max(block.numel, 1)
            for layer in block.layers:
                rows, columns = layer.shape
                effort += tokens * columns**2 + columns**3 + rows * columns**2
        if block.tower not in towers:
            towers.add(block.tower)
            first = next(tower.blocks[0].name for tower in anatomy.towers if tower.name == block.tower)
            effort += before.get(first, 0) * batches
        efforts.append(effort)
    return efforts
