"""What every evaluation task returns, and the standard error of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A value in its metric's own unit, with its standard error; None where there is one observation alone."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One measured quality.

    ``value`` is in the metric's own unit (accuracy in 0..1, perplexity); ``stderr`` its standard error, None when
    there is one observation alone; ``n`` the number of observations (questions, scored tokens); ``predictions`` one
    record a question, for the report; ``others`` further metrics of the same task by name (IR@5, SPICE).
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    by_group: dict[str, float] | None = None
    predictions: list[dict[str, Any]] | None = None
    others: dict[str, Measured] = field(default_factory=dict)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and s/√n with the sample deviation s (n − 1); for 0/1 values that is √(p(1−p)/(n−1))."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def measured(values: Sequence[float]) -> Measured:
    """:func:`mean_and_stderr` of ``values`` as one object."""
    return Measured(*mean_and_stderr(values))
