"""Allocates zeros to layers: checks the options, forms budgets and groups, applies a rule, rounds to integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ecoflap.allocation.checks import AGGREGATES, BUDGETS, GRANULARITIES, check_names, choice, fixed_ratio, unit
from ecoflap.allocation.groups import LayerSize, infeasible, make_groups, make_pools
from ecoflap.allocation.parts import Allocation, LayerAllocation
from ecoflap.allocation.rules import RULES, round_to_total
from ecoflap.errors import InfeasibleAllocation, InvalidOption, NonFiniteLoss


@dataclass(frozen=True)
class AllocationOptions:
    """Options of :func:`allocate`; None for ``rule`` and ``spread`` stands for the importance's own."""

    sparsity: float = 0.5
    max_sparsity: float | None = None
    min_sparsity: float = 0.0
    granularity: str = "block"
    aggregate: str | None = None
    budget: str = "global"
    tower_sparsity: Mapping[str, float] | None = None
    pattern: str = "unstructured"
    rule: str | None = None
    spread: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_reach(self) -> None:
        """Raises InfeasibleAllocation if the limits forbid the sparsity for any layers.

        Raises:
            InvalidOption: one of them is no number from 0 to 1.
        """
        least, most = self.min_sparsity, 1.0 if self.max_sparsity is None else self.max_sparsity
        for option, value in (("sparsity", self.sparsity), ("min_sparsity", least), ("max_sparsity", most)):
            unit(option, value)
        everywhere = not self.tower_sparsity and self.pattern == "unstructured"
        if everywhere and not least <= self.sparsity <= most:
            raise InfeasibleAllocation(
                f"sparsity {self.sparsity} is out of reach: min_sparsity is {least} and max_sparsity {most}; "
                "change the sparsity or the limits"
            )


def allocate(
    layers: Sequence[LayerSize],
    *,
    sparsity: float,
    max_sparsity: float | None = None,
    min_sparsity: float = 0.0,
    granularity: str = "block",
    aggregate: str | None = None,
    budget: str = "global",
    tower_sparsity: Mapping[str, float] | None = None,
    uniform: bool = False,
    pattern: str = "unstructured",
    rule: str = "proportional",
    spread: float | None = None,
    data: Mapping[str, Any] | None = None,
) -> Allocation:
    """Decide how many weights of each layer become zero; exact to the weight, independent of the layers' order.

    Args:
        layers: sizes and scores (finite, >= 0; scores may be None with ``uniform``).
        sparsity: target p, a fraction of all weights of ``layers``; in total round((1 - p) N) weights are kept.
        max_sparsity: upper limit for every group; by default the rule's: min(1, p + 0.1) for "proportional", with the
            tower's own target p if it has one.
        min_sparsity: lower limit for every group.
        granularity: the layers that share one sparsity: those of a "block", of an "expert" of a mixture (and the rest
            of each block), a single "layer", or those of a "tower".
        aggregate: a group's score is the "sum" of its layers' scores, or the sum divided by its weights ("mean") or by
            the number of its layers ("layer-mean"); by default the rule's: "sum" for "proportional".
        budget: "global", or "tower": every tower meets its target by itself.
        tower_sparsity: targets by tower name or modality (a name takes precedence). Each key is a budget by itself
            (with budget "tower", each of its towers is); other towers keep the overall target, together or each.
        uniform: the same sparsity in every layer; scores, rule and spread are ignored.
        pattern: "unstructured", or "N:M", which fixes every layer's ratio and so requires ``uniform``.
        rule: how scores become shares; one of :data:`~ecoflap.allocation.rules.RULES`.
        spread: the rule's limit on differences between groups; None for its default.
        data: further input of a rule, by name of the group (block, layer or tower).

    Raises:
        InvalidOption: an option or score is out of range or contradicts another one.
        NonFiniteLoss: a score is NaN or infinite.
        InfeasibleAllocation: the target cannot be met under cap and floor; the message gives the feasible range.
        UnknownName: no such rule, or ``tower_sparsity`` names no tower or modality.
    """
    target, floor = unit("sparsity", sparsity), unit("min_sparsity", min_sparsity)
    cap = None if max_sparsity is None else unit("max_sparsity", max_sparsity)
    choice("granularity", granularity, GRANULARITIES)
    choice("budget", budget, BUDGETS)
    share = RULES.get("proportional")(None) if uniform else RULES.get(rule)(spread)
    aggregate = share.aggregate if aggregate is None else choice("aggregate", aggregate, AGGREGATES)
    _check_layers(layers, scored=share.scored and not uniform)
    fixed = fixed_ratio(pattern)
    if fixed is not None:
        target = _check_ratio(pattern, fixed, target, layers, free=not uniform or bool(tower_sparsity))

    def cap_of(target: Fraction) -> Fraction:
        if cap is not None:
            return cap
        return Fraction(1) if share.margin is None else min(Fraction(1), target + share.margin)

    pools = make_pools(layers, target, budget, tower_sparsity or {})
    exact = [(1 - pool.target) * pool.weights for pool in pools]
    kept_in_pool = round_to_total(exact, round(sum(exact, Fraction(0))), [pool.name for pool in pools])
    zeros: dict[str, int] = {}
    for pool, keep in zip(pools, kept_in_pool, strict=True):
        pool_cap = cap_of(pool.target)
        if uniform:
            if not floor <= pool.target <= pool_cap:
                raise infeasible(pool, floor, pool_cap, floor, pool_cap)
            zeros.update(_split(pool.layers, pool.weights - keep))
            continue
        groups = make_groups(pool, keep, pool_cap, floor, granularity, aggregate, data)
        for group, kept in zip(groups, share(groups, keep, pool.target), strict=True):
            zeros.update(_split(group.layers, group.weights - kept))

    return Allocation(
        sparsity=float(target),
        max_sparsity=float(cap_of(max(pool.target for pool in pools))),
        granularity=granularity,
        aggregate=aggregate,
        pattern=pattern,
        rule="proportional" if uniform else rule,
        layers=tuple(
            LayerAllocation(s.name, s.tower, s.modality, s.block, s.shape, s.weights, zeros[s.name]) for s in layers
        ),
    )


def _split(layers: Sequence[LayerSize], zeros: int) -> dict[str, int]:
    """Distribute ``zeros`` over layers with the same sparsity, in proportion to their sizes."""
    whole = sum(layer.weights for layer in layers)
    exact = [Fraction(zeros * layer.weights, whole) for layer in layers]
    names = [layer.name for layer in layers]
    return dict(zip(names, round_to_total(exact, zeros, names), strict=True))


def _check_layers(layers: Sequence[LayerSize], scored: bool) -> None:
    if not layers:
        raise InvalidOption("allocation: there are no layers to allocate to")
    check_names([layer.name for layer in layers])
    for layer in layers:
        if layer.weights < 1:
            raise InvalidOption(f"layer '{layer.name}' has {layer.weights} weights; at least 1 is needed")
        if not scored:
            continue
        if layer.score is None:
            raise InvalidOption(
                f"layer '{layer.name}' has no score; measure its importance or use importance 'uniform'"
            )
        if not math.isfinite(layer.score):
            raise NonFiniteLoss(f"the score of layer '{layer.name}' is {layer.score}; measure its importance again")
        if layer.score < 0:
            raise InvalidOption(f"the score of layer '{layer.name}' is {layer.score}; scores must be 0 or more")


def _check_ratio(
    pattern: str, fixed: tuple[Fraction, int], target: Fraction, layers: Sequence[LayerSize], free: bool
) -> Fraction:
    ratio, group = fixed
    digits = len(str(float(target)).partition(".")[2])
    if target != ratio and not (digits > 1 and target == round(ratio, digits)):  # 0.67 will do for 1:3
        raise InvalidOption(f"pattern {pattern} fixes the sparsity at {float(ratio):g}, not {float(target):g}")
    if free:
        raise InvalidOption(
            f"pattern {pattern} fixes every layer's sparsity at {float(ratio):g}, so nothing can be allocated by "
            "score or tower; use importance 'uniform'"
        )
    for layer in layers:
        columns = layer.shape[1] if layer.shape else layer.weights
        if columns % group:
            raise InvalidOption(f"pattern {pattern} does not divide the {columns} columns of layer '{layer.name}'")
    return ratio
