"""The table of allocation rules, and what a rule is: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from ecoflap.registry import Registry

if TYPE_CHECKING:
    from ecoflap.allocation.groups import Group


class Rule(Protocol):
    """Shares the kept weights of one budget among its groups.

    Attributes:
        margin: without a cap of the user's, no group goes further above the target than this; None: no such cap,
            because the rule bounds the shares itself.
        scored: whether it reads the scores, which must then be there.
        aggregate: how a group's score is made of its layers', unless the user says it; one of ``AGGREGATES``.
    """

    margin: Fraction | None
    scored: bool
    aggregate: str

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        """How many weights each group keeps.

        Args:
            groups: with sizes, limits, scores and data; in the order of the layers, which must not matter.
            keep: weights to keep in all, between the sums of the groups' ``least`` and ``most``.
            target: the sparsity asked of this budget; ``keep`` is what it comes to.

        Returns:
            For each group a number between its ``least`` and ``most``; their sum is ``keep``.
        """


RULES: Registry[Callable[[float | None], Rule]] = Registry(
    "rule",
    {
        "proportional": "ecoflap.allocation.proportional:Proportional",
        "linear": "ecoflap.allocation.linear:Linear",
        "linear-relative": "ecoflap.allocation.linear:LinearRelative",
        "curves": "ecoflap.allocation.curves:LeastLoss",
    },
)
"""Name to what makes the rule of a spread (None: not given)."""
