"""Apportionment: whole numbers dealt in proportion to scores, exactly. Integers and fractions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def deal(total: int, room: list[int], scores: list[int], keys: list[tuple[str, ...]]) -> list[int]:
    """Deal ``total`` in proportion to ``scores``, to no more than its ``room`` each; the result is exact.

    Who is full drops out and the rest is dealt again (water-filling); shares are rounded by largest remainder, ties by
    ``keys``. Zero scores get nothing while the others have room, then equal shares.

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
    # A group is full when its proportional share reaches its room. In the order of room per score one pass finds all
    # full groups: once one of them has space left, so have all after it.
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
        Exact shares; those that are not cut off keep the differences that ``start`` gives them.
    """
    places = range(len(start))
    begin = [Fraction(limits[i][0] * unit - start[i], slope[i]) for i in places]  # of c, where i leaves its lower limit
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
