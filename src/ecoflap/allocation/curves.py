"""The rule of measured curves: the shares with the least summed predicted loss, exact in whole weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from ecoflap.allocation.groups import Group
from ecoflap.curve import Curve
from ecoflap.errors import InvalidOption


class LeastLoss:
    """Minimise the sum of the groups' curves under the budget.

    Each curve is made monotone, and replaced by its lower convex hull, on which the optimum is to cut where the loss
    per weight is lowest, segment by segment, until the budget is met (the Lagrange condition: one slope for all). For
    convex curves that is the exact optimum of the piecewise linear problem; the part of a segment that is cut last
    leaves at most one group between two of its levels. Beyond its last level a curve goes on with its last slope.

    Raises:
        InvalidOption: a spread is given, which this rule does not have, or a group has no curve.
    """

    margin: Fraction | None = None
    scored = False
    aggregate = "sum"

    def __init__(self, spread: float | None = None) -> None:
        if spread is not None:
            raise InvalidOption(f"spread {spread:g}: the rule 'curves' has none; max_sparsity bounds it")

    def __call__(self, groups: Sequence[Group], keep: int, target: Fraction) -> list[int]:
        segments: list[tuple[float, tuple[str, ...], int, int, int]] = []  # slope, key, order in the group, group, size
        for number, group in enumerate(groups):
            if not isinstance(group.data, Curve):
                raise InvalidOption(
                    f"the rule 'curves' needs a measured curve of '{group.name}': "
                    "measure the importance 'sensitivity', and allocate at its granularity"
                )
            corners = _hull(_limited(group))
            segments += (
                ((high[1] - low[1]) / (high[0] - low[0]), group.key, order, number, high[0] - low[0])
                for order, (low, high) in enumerate(pairwise(corners))
            )
        kept = [group.most for group in groups]
        rest = sum(kept) - keep
        for _, _, _, number, size in sorted(segments):
            cut = min(size, rest)
            kept[number] -= cut
            rest -= cut
        return kept


def _limited(group: Group) -> list[tuple[int, float]]:
    """Corners (weights cut, loss) of the group's curve between its floor and its cap, in whole weights."""
    curve = group.data.monotone()
    places = [level * group.weights for level in curve.levels]
    points = [(0.0, 0.0), *zip(places, curve.losses, strict=True)]
    (x1, y1), (x2, y2) = points[-2:]
    if x2 < group.weights:
        points.append((float(group.weights), y2 + (y2 - y1) / (x2 - x1) * (group.weights - x2)))
    first, last = group.weights - group.most, group.weights - group.least
    # Both neighbours of a corner that is no whole number of weights: between all of these the curve is straight.
    inner = sorted({end(x) for x, _ in points for end in (math.floor, math.ceil)} | {first, last})
    return [(x, _at(points, x)) for x in inner if first <= x <= last]


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x1, y1), (x2, y2) in pairwise(points):
        if x <= x2:
            return y1 + (y2 - y1) * (x - x1) / (x2 - x1)
    return points[-1][1]


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points with ascending x (Andrew's monotone chain)."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull
