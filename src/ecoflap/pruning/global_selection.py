"""The lowest scores of many tensors together, exactly, without ever holding them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecoflap.errors import NonFiniteLoss

_HALF = 16  # bits that one pass decides
_FIRST = -1  # the key of what is zero already


def keys_of(scores: Tensor, weight: Tensor) -> Tensor:
    """Integers in the order of the scores: the bits of an fp32 number that is not negative, read as int32.

    Args:
        scores: fp32, at least 0, of any shape.
        weight: of the same shape; where it is zero already the key comes before all others, whatever the score.

    Raises:
        NonFiniteLoss: a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteLoss("a score is NaN or infinite")
    keys = scores.abs().contiguous().view(torch.int32)  # abs: no -0.0, whose bits are those of a negative integer
    return keys.masked_fill_(weight == 0, _FIRST)


@dataclass
class Lowest:
    """The lowest keys of a pool of tensors: all below ``limit``, and the first ``ties`` of those that equal it.

    :meth:`take` is called once for each tensor, in the order that decides among equal keys.
    """

    limit: int
    ties: int

    def take(self, keys: Tensor) -> Tensor:
        """Mask of this tensor's share of the lowest keys, in its shape."""
        lowest = keys < self.limit
        equal = keys == self.limit
        count = int(equal.sum())
        if self.ties >= count:
            lowest |= equal
        elif self.ties > 0:
            order = equal.flatten().cumsum(0).view_as(equal)
            lowest |= equal & (order <= self.ties)
        self.ties -= min(count, self.ties)
        return lowest


def lowest(pool: Callable[[], Iterable[Tensor]], count: int) -> Lowest:
    """The ``count`` lowest keys of all tensors that ``pool()`` yields; equal ones in its order, then by index.

    The limit is found by two histograms, of the upper and of the lower half of its bits, so ``pool`` is asked twice
    and no more than one tensor's keys are in memory at a time.

    Args:
        pool: yields int32 keys (:func:`keys_of`), the same ones at each call.
        count: from 0 to the number of keys.
    """
    if count == 0:
        return Lowest(_FIRST, 0)
    upper, below = _bin(_histogram(((keys - _FIRST) >> _HALF for keys in pool()), 1 << (31 - _HALF)), count)
    inside = ((keys - _FIRST)[((keys - _FIRST) >> _HALF) == upper] & ((1 << _HALF) - 1) for keys in pool())
    lower, under = _bin(_histogram(inside, 1 << _HALF), count - below)
    return Lowest((upper << _HALF) + lower + _FIRST, count - below - under)


def _histogram(pool: Iterable[Tensor], bins: int) -> Tensor:
    """How often each integer from 0 to ``bins`` - 1 occurs: (bins) int64 on the CPU."""
    total = torch.zeros(bins, dtype=torch.int64)
    for values in pool:
        total += torch.bincount(values.flatten(), minlength=bins).cpu()
    return total


def _bin(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the ``count``-th lowest value (from 1), and how many values lie in the bins before it."""
    up_to = histogram.cumsum(0)
    index = int(torch.searchsorted(up_to, count))
    return index, int(up_to[index] - histogram[index])
