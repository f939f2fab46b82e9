"""The rule of ECoFLaP: every group keeps what its cap demands, the rest is dealt in proportion to the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ecoflap.allocation.apportion import deal
from ecoflap.allocation.groups import Group
from ecoflap.errors import InvalidOption


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
            raise InvalidOption(f"spread {spread:g}: the rule 'proportional' has none; the cap max_sparsity bounds it")

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        # Only ratios count, so the scores become integers once: sums stay exact, without a gcd at every step.
        common = math.lcm(*(group.score.denominator for group in groups))
        whole = [group.score.numerator * (common // group.score.denominator) for group in groups]
        room = [group.most - group.least for group in groups]
        dealt = deal(keep - sum(group.least for group in groups), room, whole, [group.key for group in groups])
        return [group.least + more for group, more in zip(groups, dealt, strict=True)]
