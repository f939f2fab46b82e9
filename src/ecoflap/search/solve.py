"""Solves for the allocation with the least cost, given the current cost of each part, and limits the step to it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ecoflap.allocation import Allocation, LayerSize, allocate
from ecoflap.allocation.curves import Curve
from ecoflap.allocation.groups import make_pools
from ecoflap.allocation.rules import round_to_total
from ecoflap.model.parts import Layer

# Share of the mean cost of a block; lower costs are raised to it. A cost of at most 0 is noise, or a loss that first
# falls on the way back to dense; without this limit, all weights of such blocks would be removed.
_LEAST = 0.1
_IDLE = 1e-3  # share of the mean, for blocks that cost exactly 0: no output depends on them
_ROUNDING = 1e-9  # tolerance for hitting a level exactly
_OUTSIDE = 1e9  # slope beyond the limits of a step, relative to the steepest one inside


@dataclass(frozen=True)
class Shares:
    """Predicts the loss of an allocation by scaled local errors, Σ c_l·E_l(s_l), and minimises it.

    Attributes:
        layers: of the model, in its order.
        errors: local errors at the sparsities 0, 1/n, …, 1 by layer name.
        options: of :func:`ecoflap.allocation.allocate`: sparsity, max_sparsity, min_sparsity, budget, tower_sparsity.
        reach: the largest factor between a layer's scale and that of its block and kind; layers' costs are noisy.
    """

    layers: Sequence[Layer]
    errors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    reach: float = 4.0
    _kinds: dict[tuple[str, str], list[Layer]] = field(init=False, repr=False)
    _blocks: dict[str, list[Layer]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds: dict[tuple[str, str], list[Layer]] = {}
        blocks: dict[str, list[Layer]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.tower, f".{layer.kind}"), []).append(layer)
            blocks.setdefault(layer.block, []).append(layer)
        object.__setattr__(self, "_kinds", kinds)
        object.__setattr__(self, "_blocks", blocks)

    @property
    def blocks(self) -> Mapping[str, Sequence[Layer]]:
        """Layers by block name."""
        return self._blocks

    @property
    def kinds(self) -> Mapping[str, Sequence[Layer]]:
        """Layers by tower and name inside the block (such as all ``q_proj`` of a tower)."""
        return {f"{tower}{name}": layers for (tower, name), layers in self._kinds.items()}

    def error(self, layer: Layer, zeros: int) -> float:
        """E_l at this number of zeros, interpolated linearly between the levels."""
        levels = self.errors[layer.name]
        place = zeros / layer.numel * (len(levels) - 1)
        low = min(int(place), len(levels) - 2)
        return float(levels[low] + (levels[low + 1] - levels[low]) * (place - low))

    def scales(
        self,
        zeros: Mapping[str, int],
        blocks: Mapping[str, float],
        kinds: Mapping[str, float] | None = None,
        layers: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """log c_l for every layer, from the current costs of blocks, kinds and layers.

        Args:
            zeros: of the current allocation.
            blocks: cost of each block. A layer's c is its block's cost divided by its block's local error.
            kinds: cost of each kind. It gives a further factor: the cost divided by the blocks' prediction.
            layers: cost of each layer, for another factor, within ``reach``.
        """
        present = {layer.name: self.error(layer, zeros[layer.name]) for layer in self.layers}
        found: dict[str, float] = {}
        mean = math.fsum(max(cost, 0.0) for cost in blocks.values()) / len(blocks)
        for block, members in self._blocks.items():
            least = mean * (_LEAST if blocks[block] else _IDLE)
            scale = max(blocks[block], least, 1e-30) / max(math.fsum(present[one.name] for one in members), 1e-30)
            found.update({one.name: scale for one in members})
        if kinds is not None:
            for kind, alike in self.kinds.items():
                predicted = math.fsum(found[one.name] * present[one.name] for one in alike)
                factor = min(max(kinds[kind] / max(predicted, 1e-30), 1 / self.reach**2), self.reach**2)
                found.update({one.name: found[one.name] * factor for one in alike})
        if layers is not None:
            for layer in self.layers:
                predicted = found[layer.name] * present[layer.name]
                factor = layers[layer.name] / max(predicted, 1e-30)
                found[layer.name] *= min(max(factor, 1 / self.reach), self.reach)
        return {name: math.log(scale) for name, scale in found.items()}

    def best(
        self,
        scales: Mapping[str, float],
        granularity: str,
        here: Mapping[str, int] | None = None,
        step: float = 1.0,
    ) -> dict[str, int]:
        """Zeros of every layer with the least Σ c_l·E_l, exactly within the budget.

        Args:
            here: the current zeros, within the budget.
            step: largest change of a unit's sparsity from ``here`` (plus the distance to the next level of the local
                errors). The scales were measured at the current allocation, and are wrong far from it.
        """
        groups = self._blocks if granularity == "block" else {layer.name: [layer] for layer in self.layers}
        top = max(scales.values())  # only ratios count
        losses = {
            name: sum((math.exp(scales[one.name] - top) * self.errors[one.name] for one in members), torch.zeros(()))
            for name, members in groups.items()
        }
        if here is not None and step < 1:
            steep = _OUTSIDE * max(float(curve.diff().max()) for curve in losses.values())
            for name, members in groups.items():
                share = sum(here[one.name] for one in members) / sum(one.numel for one in members)
                losses[name] = _within(losses[name], share, step, steep)
        data = {}
        for name, curve in losses.items():
            count = len(curve) - 1
            data[name] = Curve(tuple(i / count for i in range(1, count + 1)), tuple(curve[1:].tolist()))
        sizes = [LayerSize(a.name, a.tower, a.block, a.numel, None, a.modality, a.shape) for a in self.layers]
        found = allocate(sizes, granularity=granularity, rule="curves", data=data, **self.options)
        return {row.name: row.zeros for row in found.layers}


def _within(losses: Tensor, share: float, step: float, steep: float) -> Tensor:
    """(levels + 1,): 0 up to ``share`` - ``step``, very high above ``share`` + ``step``, as given between.

    So a solver that takes the cheapest weights first stays in this range, since ``share`` for every unit is a solution.
    """
    count = len(losses) - 1
    low = max(0, math.floor((share - step) * count + _ROUNDING))
    high = min(count, math.ceil((share + step) * count - _ROUNDING))
    found = (losses - losses[low]).clamp(min=0)
    found[high + 1 :] += steep * torch.arange(1, count - high + 1, dtype=found.dtype)
    return found


Budgets = Sequence[Sequence[str]]
"""For each budget, the names of its layers."""


def budgets_of(allocation: Allocation, options: Mapping[str, Any]) -> Budgets:
    """The budgets of an allocation that was made with these options."""
    sizes = [LayerSize(r.name, r.tower, r.block, r.weights, None, r.modality, r.shape) for r in allocation.layers]
    pools = make_pools(
        sizes,
        Fraction(str(allocation.sparsity)),
        str(options.get("budget", "global")),
        options.get("tower_sparsity") or {},
    )
    return [[layer.name for layer in pool.layers] for pool in pools]


def between(here: Mapping[str, int], there: Mapping[str, int], step: float, budgets: Budgets) -> dict[str, int]:
    """Zeros of each layer at the share ``step`` of the way from ``here`` to ``there``, with exact sums of budgets."""
    part = Fraction(str(step))
    found: dict[str, int] = {}
    for names in budgets:
        exact = [here[name] + part * (there[name] - here[name]) for name in names]
        found.update(zip(names, round_to_total(exact, sum(here[name] for name in names), names), strict=True))
    return found


def filled(
    zeros: Mapping[str, int],
    idle: Collection[str],
    layers: Sequence[Layer],
    budgets: Budgets,
    cap: float | None,
    floor: float,
) -> dict[str, int]:
    """``zeros`` with ``idle`` layers at the cap, and correspondingly fewer in other layers of their budget.

    The others lose zeros in proportion to their zeros above ``floor``; if there are too few of these, idle layers are
    filled in proportion to their room. The sum of every budget stays exact.
    """
    sizes = {layer.name: layer.numel for layer in layers}
    found = dict(zeros)
    for names in budgets:
        room = {
            one: max(0, math.floor((1.0 if cap is None else cap) * sizes[one]) - zeros[one])
            for one in names
            if one in idle
        }
        spare = {one: max(0, zeros[one] - math.ceil(floor * sizes[one])) for one in names if one not in idle}
        takers, givers = sum(room.values()), sum(spare.values())
        amount = min(takers, givers)
        if amount:
            moved = {one: Fraction(amount * count, takers) for one, count in room.items()}
            moved |= {one: -Fraction(amount * count, givers) for one, count in spare.items()}
            exact = [zeros[one] + moved[one] for one in names]
            found.update(zip(names, round_to_total(exact, sum(zeros[one] for one in names), names), strict=True))
    return found


def flattened(zeros: Mapping[str, int], layers: Sequence[Layer], budgets: Budgets) -> dict[str, int]:
    """The same number of zeros distributed evenly over the weights of each budget."""
    sizes = {layer.name: layer.numel for layer in layers}
    found: dict[str, int] = {}
    for names in budgets:
        total, whole = sum(zeros[name] for name in names), sum(sizes[name] for name in names)
        exact = [Fraction(total * sizes[name], whole) for name in names]
        found.update(zip(names, round_to_total(exact, total, names), strict=True))
    return found
