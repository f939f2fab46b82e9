"""Spearman's rank correlation in numpy: Pearson's of the ranks, ties getting their mean rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs; ``[n]``."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return mean_rank


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of two lists of one length, -1 to 1; None where one of them is constant or shorter than 2.

    Raises:
        ValueError: the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    if len(first) < 2:
        return None
    a, b = (ranked - ranked.mean() for ranked in (ranks(first), ranks(second)))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale > 0 else None
