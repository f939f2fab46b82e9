"""Compares two models on the same samples: the difference with its standard error, and a sign test.

The errors of two models on the same samples are correlated, so the standard error is computed over the differences of
the samples; it is smaller than that of either value (Dror et al., ACL 2018, on tests in language processing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Paired:
    """One model's quality less another's, on the samples that both answered.

    Attributes:
        difference: of the two values.
        stderr: of the difference; None for a single sample.
        n: samples.
        better, worse: samples on which the one model is better, or worse, than the other; the rest are equal.
        p: of the sign test, two-sided and exact: how often samples that are better or worse by chance alone (one in
            two) are at least so unequally many.
    """

    difference: float
    stderr: float | None
    n: int
    better: int
    worse: int
    p: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired(model: Sequence[float], other: Sequence[float], *, perplexity: bool = False) -> Paired:
    """``model`` less ``other``, sample by sample.

    Args:
        model, other: scores of the same samples in the same order, of which more is better; with ``perplexity`` the
            windows' mean negative log-likelihoods, of which less is better.
        perplexity: the values are exp(mean); their difference and its error are those of perplexities (delta method:
            a window weighs as much as the value changes with its loss).

    Raises:
        ValueError: there are no samples, or not as many of both.
    """
    n = len(model)
    if not n or n != len(other):
        raise ValueError(f"{n} samples of the one model and {len(other)} of the other can't be paired")
    ours, theirs = math.fsum(model) / n, math.fsum(other) / n
    if perplexity:
        ours, theirs = math.exp(min(ours, 700.0)), math.exp(min(theirs, 700.0))
    weights = (ours, theirs) if perplexity else (1.0, 1.0)
    parts = [weights[0] * one - weights[1] * two for one, two in zip(model, other, strict=True)]
    mean = math.fsum(parts) / n
    stderr = None if n < 2 else math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / (n - 1) / n)
    more = sum(one > two for one, two in zip(model, other, strict=True))
    less = sum(one < two for one, two in zip(model, other, strict=True))
    better, worse = (less, more) if perplexity else (more, less)
    return Paired(ours - theirs, stderr, n, better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of ``better`` against ``worse`` under a fair coin, exactly: 2·P(X ≤ the fewer), at most 1."""
    n, fewer = better + worse, min(better, worse)
    ways, term = 0, 1
    for k in range(fewer + 1):
        ways += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(2 * ways / 2**n)) if n < 1000 else min(1.0, 2.0 ** (math.log2(ways) + 1 - n))


def paired_records(
    model: Mapping[str, Any], other: Mapping[str, Any], value: float | None, reference: float | None
) -> Paired | None:
    """:func:`paired` of two models' records of one task, as a run keeps them; None where they say nothing of samples.

    Args:
        model, other: ``losses`` of a perplexity's windows, or ``answers`` with ``index`` and ``score``.
        value, reference: of the two models: scores that have other means are of another metric, and say nothing here.
    """
    if model.get("losses") and other.get("losses"):
        found = paired(model["losses"], other["losses"], perplexity=True)
    elif model.get("answers") and other.get("answers"):
        scores = {row["index"]: float(row["score"]) for row in other["answers"]}
        both = [row for row in model["answers"] if row["index"] in scores]
        if len(both) != len(model["answers"]) or len(both) != len(scores):
            return None
        found = paired([float(row["score"]) for row in both], [scores[row["index"]] for row in both])
    else:
        return None
    if value is None or reference is None or not math.isclose(found.difference, value - reference, abs_tol=1e-6):
        return None
    return found
