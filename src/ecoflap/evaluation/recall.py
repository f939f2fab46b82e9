"""Ranks of right candidates by score, with or without a second, dearer score for the best ones; pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ecoflap.evaluation.shared import Shared
from ecoflap.progress import Task
from ecoflap.workers import ALONE, Workers

ROWS = 256  # queries at a time: 26 MB of scores for the 25,000 captions of COCO's test set


@dataclass(frozen=True)
class Queries:
    """Queries against all candidates.

    Attributes:
        count: number of queries.
        scores: scores of all candidates for some queries, ``[B, C]``.
        right: which candidates are right for them, bool ``[B, C]``.
        match: the dearer score of some candidates for one query, ``[number of them]``.
    """

    count: int
    scores: Callable[[slice], Tensor]
    right: Callable[[slice], Tensor]
    match: Callable[[int, list[int]], Tensor]


def rank_queries(queries: Queries, rerank: int, task: Task, workers: Workers = ALONE) -> list[int]:
    """Rank of the best right candidate of each query, 0 = first; the best ``rerank`` are sorted anew.

    With ``rerank`` each query is one worker's.
    """
    told: Shared[int] = Shared(workers)
    found: list[int] = []
    for start in range(0, queries.count, ROWS):
        rows = slice(start, min(start + ROWS, queries.count))
        scores, right = queries.scores(rows), queries.right(rows)
        if not rerank:
            found += ranks(scores, right).tolist()
            task.advance(rows.stop - rows.start)
            continue
        for row, query in enumerate(range(rows.start, rows.stop)):
            told.add(partial(_matched, queries, query, scores[row], right[row], rerank))
            task.advance()
    return found + told.all()


def _matched(queries: Queries, query: int, scores: Tensor, right: Tensor, rerank: int) -> int:
    top = scores.topk(min(rerank, len(scores))).indices
    return _reranked(scores, right, top, queries.match(query, top.tolist()))


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates score at least as high as the best right one, ``[B]`` from ``[B, C]`` each.

    A tie counts against the right one, so that a model that scores all alike finds nothing.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def _reranked(scores: Tensor, right: Tensor, top: Tensor, matched: Tensor) -> int:
    """:func:`ranks` of one query ``[C]`` after the candidates ``top`` were sorted by matching score plus score."""
    if not bool(right[top].any()):  # it stays behind all of them
        return int(ranks(scores[None], right[None]))
    return int(ranks((matched + scores[top])[None], right[top][None]))
