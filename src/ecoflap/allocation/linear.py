"""Rules in which a group's share is linear in its score, within a spread around the target: OWL, DLP, AlphaPruning.

They bound the shares by their spread, so that no cap is needed; where a cap, a floor or the group's size cuts a share
off, the others are shifted (or scaled) together until the budget is met again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ecoflap.allocation.apportion import level, round_to_total
from ecoflap.allocation.checks import unit
from ecoflap.allocation.groups import Group
from ecoflap.errors import InvalidOption


class Linear:
    """The kept share of group g is 1 − p + 2λ(t_g − t̄), t_g being its score's place between the lowest (0) and the
    highest (1), t̄ the mean of all t_g weighted by size, λ the spread.

    That is the map of OWL (Yin et al., ICML 2024, arXiv 2310.05175, section 3) and DLP (Chen et al., ICML 2025, arXiv
    2505.23807, section 3) as their published code has it: shares lie in a band 2λ wide, whose mean is the target. Their
    mean is unweighted, which is the same for blocks of one size and misses the budget for others.

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
        # In units of 1 / (q · width) weights, q being λ's denominator, everything is a whole number.
        kept = level(
            keep,
            [2 * self.spread.numerator * group.weights * place for group, place in zip(groups, places, strict=True)],
            [group.weights for group in groups],
            [(group.least, group.most) for group in groups],
            unit=self.spread.denominator * width,
        )
        return round_to_total(kept, keep, [group.key for group in groups])


class LinearRelative:
    """The sparsity of group g is η(1 + τ(1 − 2t_g)), with t_g as in :class:`Linear`, τ the spread, and η such that the
    budget is met: from η(1 + τ) for the lowest score to η(1 − τ) for the highest.

    That is the map of AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912, section 3.2), which gives each group the
    sparsity η((α_g − α_min) / (α_max − α_min) · 2τ + 1 − τ); our scores fall where its α rises.

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
    """Whole numbers t · width: 0 for the lowest score, width for the highest; equal scores stand in the middle."""
    common = math.lcm(*(group.score.denominator for group in groups))
    scores = [group.score.numerator * (common // group.score.denominator) for group in groups]
    lowest, highest = min(scores), max(scores)
    if lowest == highest:
        return [1] * len(groups), 2
    divisor = math.gcd(*(score - lowest for score in scores))
    return [(score - lowest) // divisor for score in scores], (highest - lowest) // divisor
