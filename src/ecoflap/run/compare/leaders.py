"""Finds the methods of a comparison that are the best at a sparsity, within error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from ecoflap.support.formats import Pair


class Figure(Protocol):
    """The mean of a method, and its error; None if it has none."""

    @property
    def mean(self) -> float: ...
    @property
    def error(self) -> float | None: ...


def leaders(
    column: Mapping[str, Figure], higher_is_better: bool, pairs: Mapping[str, Pair] | None = None
) -> tuple[str | None, frozenset[str]]:
    """The best method of one sparsity, and the set of all that are as good within error (with the best itself).

    A method is as good if its difference from the best is at most the standard error of the paired difference, if
    ``pairs`` has it; else at most √(a² + b²) with the two errors a and b (0 if there is none).
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
