"""Makes masks with exact counts (per row, per matrix, N of M); equal scores are ordered by index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Pattern, Unstructured, check_fits
from ecoflap.errors import NonFiniteLoss

# Up to this M, ranking each weight against the others of its group is faster than a selection per group.
_RANKED_GROUP = 16


def lowest_mask(scores: Tensor, zeros: int, pattern: Pattern) -> Tensor:
    """The mask that removes the ``zeros`` lowest scores, as the pattern allows.

    Unstructured per row: rows differ by at most one zero; those with one more are the rows with the lowest next score.
    Of equal scores, the one with the lower index is removed first.

    Args:
        scores: (out, in), finite or infinite, not NaN.
        zeros: exact number of weights to remove.

    Returns:
        (out, in) bool, True = kept.

    Raises:
        InvalidOption: the count or the shape doesn't fit the pattern.
        NonFiniteLoss: a score is NaN.
    """
    rows, columns = scores.shape
    check_fits(pattern, (rows, columns), zeros)
    if zeros in (0, scores.numel()):
        return torch.full_like(scores, zeros == 0, dtype=torch.bool)
    if torch.isnan(scores).any():
        raise NonFiniteLoss(
            f"scores of a weight of shape {rows} x {columns} are NaN; its weights or inputs are not finite"
        )
    if isinstance(pattern, NofM):
        grouped = scores.reshape(-1, pattern.group)
        return ~lowest_in_rows(grouped, pattern.group - pattern.kept).reshape(rows, columns)
    if pattern.compare == "matrix":
        return ~lowest_in_rows(scores.reshape(1, -1), zeros).reshape(rows, columns)
    return ~_lowest_evenly(scores, zeros)


def gradual_mask(scores: Tensor, zeros: int, goal: int, pattern: Pattern) -> Tensor:
    """As :func:`lowest_mask`, for any number of ``zeros`` on the way to ``goal`` zeros.

    For an N:M pattern, these are the lowest of the scores that the pattern removes in the end.
    """
    if isinstance(pattern, NofM) and zeros < goal:
        final = lowest_mask(scores, goal, pattern)
        return lowest_mask(scores.masked_fill(final, torch.inf), zeros, Unstructured("matrix"))
    return lowest_mask(scores, zeros, pattern)


def row_quotas(scores: Tensor, zeros: int) -> Tensor:
    """Zeros for each row of ``scores`` (out, in), which differ by at most one, more for low next scores: (out,)."""
    base, extra = divmod(zeros, len(scores))
    if not extra:  # the base may be all columns, without a next score
        return torch.full((len(scores),), base, device=scores.device)
    return _quotas(_kth_lowest(scores, base + 1), base, extra)


def _quotas(following: Tensor, base: int, extra: int) -> Tensor:
    """``base`` for each row, one more for the ``extra`` rows with the lowest first entry of ``following``."""
    quotas = torch.full((len(following),), base, device=following.device)
    quotas[torch.argsort(following[:, 0], stable=True)[:extra]] += 1
    return quotas


def _lowest_evenly(scores: Tensor, zeros: int) -> Tensor:
    """As ``lowest_by_counts(scores, row_quotas(scores, zeros))``, with one selection if no scores are equal."""
    base, extra = divmod(zeros, len(scores))
    if not extra:
        return lowest_in_rows(scores, base)
    following = _kth_lowest(scores, base + 1)
    quotas = _quotas(following, base, extra)
    lowest = scores < following
    one_more = (quotas > base).nonzero().squeeze(1)
    lowest[one_more] = scores[one_more] <= following[one_more]
    tied = (_counts(lowest) != quotas).nonzero().squeeze(1)
    if len(tied):
        lowest[tied] = lowest_by_counts(scores[tied], quotas[tied])
    return lowest


def lowest_by_counts(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the ``counts[r]`` lowest scores of each row r; (out, in) bool, True = among them. For few counts."""
    marked = torch.empty_like(scores, dtype=torch.bool)
    for count in torch.unique(counts).tolist():
        rows = counts == count
        marked[rows] = lowest_in_rows(scores[rows], count)
    return marked


def lowest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest scores of every row of (rows, columns), ties by index; True = among the lowest."""
    columns = scores.shape[1]
    if count in (0, columns):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if columns <= _RANKED_GROUP:
        return _ranks(scores) < count
    threshold = _kth_lowest(scores, count)
    lowest = scores <= threshold
    surplus = _counts(lowest) - count
    tied = surplus.nonzero().squeeze(1)
    if len(tied):  # more scores equal the threshold than are needed: take the first by index
        some, limit = scores[tied], threshold[tied]
        below, equal = some < limit, some == limit
        places = count - below.sum(dim=1, keepdim=True)
        lowest[tied] = below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= places))
    return lowest


def _counts(marked: Tensor) -> Tensor:
    """Number of marked scores in each row: (rows,)."""
    if marked.device.type == "cpu":  # torch would convert the whole mask to int64 first
        return torch.from_numpy(np.count_nonzero(marked.numpy(), axis=1))
    return marked.sum(dim=1, dtype=torch.int32)


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest value of every row, counted from 1: (rows, 1). NaN counts as highest."""
    if scores.device.type == "cpu":  # numpy's selection is vectorised: a seventh of kthvalue's time
        return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=1, keepdim=True).values


def _ranks(scores: Tensor) -> Tensor:
    """Rank of every score in its row, 0 = lowest, ties by index; for short rows."""
    ranks = torch.zeros_like(scores, dtype=torch.uint8)
    for column in range(scores.shape[1]):
        one = scores[:, column : column + 1]
        ranks[:, :column] += one < scores[:, :column]
        ranks[:, column + 1 :] += one <= scores[:, column + 1 :]
    return ranks
