"""Defines the allocation rules: how scores become numbers of kept weights. A new rule is one class and one line here.

``proportional`` is the rule of ECoFLaP: shares in proportion to the scores, under a cap. The linear rules (OWL, DLP,
AlphaPruning) bound the shares by their spread, so they need no cap; if a limit cuts off a share, all others are
shifted (or scaled) until the budget is met. All rules round by largest remainder, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from ecoflap.allocation.checks import unit
from ecoflap.allocation.groups import Group
from ecoflap.errors import InvalidOption
from ecoflap.support.registry import Registry, entry

if TYPE_CHECKING:
    from ecoflap.allocation.groups import Group


class Rule(Protocol):
    """Distributes the kept weights of one budget over its groups.

    Attributes:
        margin: the default cap is the target plus this; None: no cap, because the rule itself limits the shares.
        scored: whether the rule needs scores.
        aggregate: the default way to combine the scores of a group's layers; one of ``AGGREGATES``.
    """

    margin: Fraction | None
    scored: bool
    aggregate: str

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        """How many weights each group keeps.

        Args:
            groups: with sizes, limits, scores and data; the result must not depend on their order.
            keep: total of weights to keep, between the sums of the groups' ``least`` and ``most``.
            target: the sparsity of this budget, from which ``keep`` was computed.

        Returns:
            For each group a number between its ``least`` and ``most``; their sum is ``keep``.
        """


RULES: Registry[Callable[[float | None], Rule]] = Registry(
    "rule",
    {
        "proportional": entry("ecoflap.allocation.rules:Proportional", cites=("ecoflap",)),
        "linear": "ecoflap.allocation.rules:Linear",
        "linear-relative": "ecoflap.allocation.rules:LinearRelative",
        "curves": "ecoflap.allocation.curves:LeastLoss",
    },
)


"""By name, the class that makes the rule from a spread (None: not given)."""


def distribute(total: int, room: list[int], scores: list[int], keys: list[tuple[str, ...]]) -> list[int]:
    """Distribute ``total`` in proportion to ``scores``, at most ``room`` to each; the sum is exact.

    When a group is full, the rest is distributed over the others (water-filling). Shares are rounded by largest
    remainder, ties by ``keys``. Groups with score zero get nothing while others have room, then equal shares.

    Args:
        total: at most the sum of ``room``.
        scores: non-negative integers of any size; only their ratios count.
    """
    dealt = [0] * len(room)
    positive = [i for i, score in enumerate(scores) if score]
    amount = min(total, sum(room[i] for i in positive))
    _fill(dealt, positive, amount, room, scores, keys)
    _fill(dealt, [i for i, score in enumerate(scores) if not score], total - amount, room, [1] * len(room), keys)
    return dealt


def _fill(
    dealt: list[int], among: list[int], amount: int, room: list[int], scores: list[int], keys: list[tuple[str, ...]]
) -> None:
    """Write the shares of ``amount`` (at most the sum of ``room``) into ``dealt``."""
    # A group is full when its proportional share reaches its room. In the order of room per score, one pass finds all
    # full groups: if one of them is not full, none after it is.
    order = sorted(among, key=lambda i: Fraction(room[i], scores[i]))
    open_score = sum(scores[i] for i in among)
    full = 0
    for i in order:
        if amount * scores[i] < room[i] * open_score:
            break
        dealt[i], amount, open_score, full = room[i], amount - room[i], open_score - scores[i], full + 1
    rest = sorted(order[full:], key=lambda i: (-(amount * scores[i] % open_score), keys[i]))
    for i in rest:
        dealt[i] = amount * scores[i] // open_score
    for i in rest[: amount - sum(dealt[i] for i in rest)]:
        dealt[i] += 1


def round_to_total(exact: Sequence[Fraction], total: int, keys: Sequence[str | tuple[str, ...]]) -> list[int]:
    """Round ``exact`` up or down so that the sum is ``total``: largest remainder first, ties by key.

    ``total`` must lie between the sums of the floors and of the ceilings.
    """
    rounded = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (rounded[i] - exact[i], keys[i]))
    for i in order[: total - sum(rounded)]:
        rounded[i] += 1
    return rounded


def level(
    total: int, start: list[int], slope: list[int], limits: list[tuple[int, int]], unit: int = 1
) -> list[Fraction]:
    """(start + c · slope) / unit, cut off at ``limits``, for the one number c at which the sum is ``total``.

    Args:
        total: between the sums of the lower and of the upper limits.
        start, slope: integers of any size; slopes are positive.
        limits: lowest and highest value of each.
        unit: positive.

    Returns:
        Exact shares; those that are not cut off keep their differences in ``start``.
    """
    places = range(len(start))
    begin = [
        Fraction(limits[i][0] * unit - start[i], slope[i]) for i in places
    ]  # the c at which i leaves its lower limit
    end = [Fraction(limits[i][1] * unit - start[i], slope[i]) for i in places]
    events = sorted([(begin[i], i, 1) for i in places] + [(end[i], i, -1) for i in places])
    # As c grows past its events, the sum is fixed + c · steep, in units.
    fixed, steep = sum(low for low, _ in limits) * unit, 0
    c = Fraction(0)
    for event, i, sign in events:
        if fixed + event * steep >= total * unit:
            c = (Fraction(total * unit) - fixed) / steep if steep else event
            break
        low, high = limits[i]
        fixed += start[i] - low * unit if sign > 0 else high * unit - start[i]
        steep += sign * slope[i]
    return [min(max((start[i] + c * slope[i]) / unit, Fraction(limits[i][0])), Fraction(limits[i][1])) for i in places]


class Proportional:
    """Sung et al., ICLR 2024, arXiv 2310.02998, section 3.2, in numbers of weights. See docs/allocation.md.

    Raises:
        InvalidOption: a spread is given, which this rule does not have.
    """

    margin: Fraction | None = Fraction(1, 10)
    scored = True
    aggregate = "sum"

    def __init__(self, spread: float | None = None) -> None:
        if spread is not None:
            raise InvalidOption(f"spread {spread:g}: rule 'proportional' has no spread; limit it with max_sparsity")

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        # Only ratios count, so the scores become integers: sums are exact, without a gcd at every step.
        common = math.lcm(*(group.score.denominator for group in groups))
        whole = [group.score.numerator * (common // group.score.denominator) for group in groups]
        room = [group.most - group.least for group in groups]
        dealt = distribute(keep - sum(group.least for group in groups), room, whole, [group.key for group in groups])
        return [group.least + more for group, more in zip(groups, dealt, strict=True)]


class Linear:
    """The kept share of group g is 1 − p + 2λ(t_g − t̄): t_g is its score scaled to 0 (lowest) to 1 (highest), t̄ the
    mean of all t_g weighted by size, λ the spread.

    This is the map of OWL (Yin et al., ICML 2024, arXiv 2310.05175, section 3) and DLP (Chen et al., ICML 2025, arXiv
    2505.23807, section 3) in their published code: shares are in a band of width 2λ, whose mean is the target. Their
    mean is unweighted, which is the same for blocks of equal size and misses the budget for others.

    Args:
        spread: λ, from 0 to 1; by default OWL's 0.08.

    Raises:
        InvalidOption: the spread is out of range.
    """

    margin: Fraction | None = None
    scored = True
    aggregate = "layer-mean"

    def __init__(self, spread: float | None = None) -> None:
        self.spread = unit("spread", 0.08 if spread is None else spread)

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        places, width = _places(groups)
        # In units of 1 / (q · width) weights, with λ's denominator q, everything is an integer.
        kept = level(
            keep,
            [2 * self.spread.numerator * group.weights * place for group, place in zip(groups, places, strict=True)],
            [group.weights for group in groups],
            [(group.least, group.most) for group in groups],
            unit=self.spread.denominator * width,
        )
        return round_to_total(kept, keep, [group.key for group in groups])


class LinearRelative:
    """The sparsity of group g is η(1 + τ(1 − 2t_g)), with t_g as in :class:`Linear`, the spread τ, and η such that the
    budget is met: from η(1 + τ) for the lowest score to η(1 − τ) for the highest.

    This is the map of AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912, section 3.2), which gives each group the
    sparsity η((α_g − α_min) / (α_max − α_min) · 2τ + 1 − τ); our scores fall as its α rises.

    Args:
        spread: τ, at least 0 and below 1; by default the published 0.3.

    Raises:
        InvalidOption: the spread is out of range.
    """

    margin: Fraction | None = None
    scored = True
    aggregate = "layer-mean"

    def __init__(self, spread: float | None = None) -> None:
        self.spread = unit("spread", 0.3 if spread is None else spread)
        if self.spread == 1:
            raise InvalidOption("spread must be below 1 for the rule 'linear-relative', not 1")

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        places, width = _places(groups)
        whole, part = self.spread.denominator * width, self.spread.numerator
        weights = sum(group.weights for group in groups)
        zeros = level(
            weights - keep,
            [0] * len(groups),
            [group.weights * (whole + part * (width - 2 * place)) for group, place in zip(groups, places, strict=True)],
            [(group.weights - group.most, group.weights - group.least) for group in groups],
        )
        kept = [group.weights - cut for group, cut in zip(groups, zeros, strict=True)]
        return round_to_total(kept, keep, [group.key for group in groups])


def _places(groups: Sequence[Group]) -> tuple[list[int], int]:
    """Integers t · width: 0 for the lowest score, width for the highest; half of it if all scores are equal."""
    common = math.lcm(*(group.score.denominator for group in groups))
    scores = [group.score.numerator * (common // group.score.denominator) for group in groups]
    lowest, highest = min(scores), max(scores)
    if lowest == highest:
        return [1] * len(groups), 2
    divisor = math.gcd(*(score - lowest for score in scores))
    return [(score - lowest) // divisor for score in scores], (highest - lowest) // divisor
