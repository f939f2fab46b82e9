"""Allocates by measured curves (loss over sparsity): minimises the sum of the predicted losses, in whole weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ecoflap.allocation.groups import Group
from ecoflap.errors import InvalidOption


@dataclass(frozen=True)
class Curve:
    """The cost of pruning one group: predicted loss over sparsity, starting at loss 0 for sparsity 0.

    Attributes:
        levels: sparsities, ascending, above 0 and at most 1.
        losses: the loss added at each level, in any unit that is the same for all groups.

    Raises:
        InvalidOption: the levels or losses are not of that kind.
    """

    levels: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.losses):
            raise InvalidOption(
                f"a curve of {len(self.levels)} levels and {len(self.losses)} losses: give one loss for each level"
            )
        if not all(math.isfinite(loss) for loss in self.losses):
            raise InvalidOption(f"a curve's losses must be finite numbers, not {list(self.losses)}")
        if not (self.levels[0] > 0 and self.levels[-1] <= 1 and all(a < b for a, b in pairwise(self.levels))):
            raise InvalidOption(f"a curve's levels must rise, above 0 and up to 1 at most, not {list(self.levels)}")

    def to_json(self) -> dict[str, Any]:
        return {"levels": list(self.levels), "losses": list(self.losses)}

    @classmethod
    def from_json(cls, data: Any) -> Curve:
        """Read what :meth:`to_json` wrote. Raises InvalidOption."""
        try:
            levels, losses = (tuple(float(value) for value in data[key]) for key in ("levels", "losses"))
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise InvalidOption(f"a curve needs lists of numbers 'levels' and 'losses', not {data!r}") from error
        return cls(levels, losses)

    def monotone(self) -> Curve:
        """The nearest curve (least squares) that never falls and is nowhere below 0; noise can make a curve fall."""
        blocks: list[tuple[float, int]] = []  # means and lengths, pooled where they would fall
        for loss in self.losses:
            mean, length = loss, 1
            while blocks and blocks[-1][0] >= mean:
                before, others = blocks.pop()
                mean, length = (mean * length + before * others) / (length + others), length + others
            blocks.append((mean, length))
        losses = tuple(max(0.0, mean) for mean, length in blocks for _ in range(length))
        return Curve(self.levels, losses)


class LeastLoss:
    """Minimise the sum of the groups' curves under the budget.

    Each curve is made monotone and replaced by its lower convex hull. Then segments are cut in the order of their loss
    per weight until the budget is met (the Lagrange condition: one slope for all). For convex curves this is the exact
    optimum of the piecewise linear problem; at most one group ends between two of its levels. Beyond its last level a
    curve continues with its last slope.

    Raises:
        InvalidOption: a spread is given, which this rule does not have, or a group has no curve.
    """

    margin: Fraction | None = None
    scored = False
    aggregate = "sum"

    def __init__(self, spread: float | None = None) -> None:
        if spread is not None:
            raise InvalidOption(f"spread {spread:g}: rule 'curves' has no spread; limit it with max_sparsity")

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
