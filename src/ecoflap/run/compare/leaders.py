"""Says which methods of a comparison are the best at a sparsity, within error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from ecoflap.support.formats import Pair


class Figure(Protocol):
    """The mean of a method, and its error; None where there is none."""

    @property
    def mean(self) -> float: ...
    @property
    def error(self) -> float | None: ...


def leaders(
    column: Mapping[str, Figure], higher_is_better: bool, pairs: Mapping[str, Pair] | None = None
) -> tuple[str | None, frozenset[str]]:
    """The best method of one sparsity, and all that are as good within error, itself among them.

    A method is as good if it differs by no more than the standard error of its paired difference from the best, where
    ``pairs`` has that; else by no more than √(a² + b²), a and b being the two errors (0 where there is none).
    """
    if not column:
        return None, frozenset()
    pick = max if higher_is_better else min
    best = pick(column, key=lambda name: column[name].mean)
    top = column[best]

    def error(name: str) -> float:
        if pairs and name in pairs and name != best:
            return pairs[name].stderr or 0.0
        return math.hypot(column[name].error or 0.0, top.error or 0.0)

    return best, frozenset(name for name, s in column.items() if abs(s.mean - top.mean) <= error(name))
