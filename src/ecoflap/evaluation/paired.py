"""Compares two models on the same samples: the difference with its standard error, and a sign test.

The errors of two models on the same samples are correlated, so the standard error is computed over the differences of
the samples; it is smaller than that of either value (Dror et al., ACL 2018, on tests in language processing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecoflap.evaluation.task import TaskResult


@dataclass(frozen=True)
class Samples:
    """One model's score on each sample of a test.

    Attributes:
        scores: more is better; with ``tokens``, negative log-likelihoods per token (less is better).
        index: number of each sample in its data.
        kinds: the group of each sample; empty if there are no groups.
        tokens: of each sample, if the test's value is the perplexity exp(Σ tokens·score / Σ tokens); empty if it is the
            mean score.
        others: further metrics of the same test, by name: scores (more is better) whose mean is the metric's value.
            They may have other samples, such as captions where the test's own samples are images.
    """

    scores: list[float]
    index: list[int]
    kinds: list[str | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, result: TaskResult) -> Samples | None:
        """The samples of a task's result; None if it has no scores of samples, or if these don't give its value."""
        if result.losses is not None:
            tokens = result.tokens or [1] * len(result.losses)
            found = cls(list(result.losses), list(range(len(tokens))), list(result.kinds or ()), list(tokens))
        elif result.scores:
            found = cls(list(result.scores), list(range(len(result.scores))), list(result.kinds or ()))
        else:
            rows = result.predictions or []
            scores, index = [row.get("score") for row in rows], [row.get("index") for row in rows]
            if not rows or not all(isinstance(one, int | float) for one in scores):
                return None
            if not all(isinstance(one, int) for one in index) or len(set(index)) < len(index):
                return None
            kinds = [row.get("kind") for row in rows]
            grouped = any(kind is not None for kind in kinds)
            found = cls([float(one) for one in scores if one is not None], [one for one in index if one is not None],
                        kinds if grouped else [])  # fmt: skip
        if not _close(found.value, result.value):
            return None
        means = {name: one for name, one in result.others.items() if one.scores}
        known = {name: one.scores for name, one in means.items() if one.scores and _close(_mean(one.scores), one.value)}
        return replace(found, others=known)

    @property
    def value(self) -> float:
        """The mean score, or the perplexity."""
        if not self.tokens:
            return math.fsum(self.scores) / len(self.scores)
        total = math.fsum(score * count for score, count in zip(self.scores, self.tokens, strict=True))
        return math.exp(min(total / sum(self.tokens), 700.0))

    def parts(self) -> list[float]:
        """What each sample adds to n · value, to first order and up to a constant: its score; for a perplexity, by the
        delta method, value · tokens · loss / mean tokens."""
        if not self.tokens:
            return self.scores
        value, mean = self.value, sum(self.tokens) / len(self.tokens)
        level = math.log(value) if value > 0 else 0.0
        return [value * count * (score - level) / mean for score, count in zip(self.scores, self.tokens, strict=True)]

    def group(self, kind: str) -> Samples:
        """The samples of one group."""
        rows = [row for row, own in enumerate(self.kinds) if own == kind]
        return self.taken(rows)

    def taken(self, rows: Sequence[int]) -> Samples:
        """These rows, in this order; without the further metrics, which may have other samples."""
        return Samples(
            [self.scores[row] for row in rows], [self.index[row] for row in rows],
            [self.kinds[row] for row in rows] if self.kinds else [], [self.tokens[row] for row in rows] if self.tokens
            else [],
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain types, for a run's journal and a comparison's cells."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """One model's quality minus another's, on the same samples.

    Attributes:
        difference: of the two values.
        stderr: of the difference; None for a single sample.
        n: number of samples.
        better, worse: number of samples on which the first model is better, or worse; the rest are equal.
        p: of the two-sided exact sign test.
        groups: the same for each group of samples.
        others: the same for further metrics of the test.
    """

    difference: float
    stderr: float | None
    n: int
    better: int
    worse: int
    p: float
    groups: dict[str, Paired] = field(default_factory=dict)
    others: dict[str, Paired] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain types; empty parts are left out."""
        parts = {"groups": self.groups, "others": self.others}
        found = {name: value for name, value in vars(self).items() if name not in parts}
        return found | {
            name: {key: pair.to_json() for key, pair in pairs.items()} for name, pairs in parts.items() if pairs
        }


def paired(models: Sequence[Samples], others: Sequence[Samples]) -> Paired | None:
    """``models`` minus ``others``, sample by sample; None if their samples differ.

    Args:
        models, others: one model each, or the models of several seeds. Values and scores are averaged over the seeds,
            so that the standard error is that of the choice of samples, for these seeds.
    """
    if not models or not others or not models[0].index:
        return None
    first, *rest = [*models, *others]
    places = {number: row for row, number in enumerate(first.index)}
    in_order = [first]
    for one in rest:
        if set(one.index) != set(places) or len(one.index) != len(places) or bool(one.tokens) != bool(first.tokens):
            return None
        rows = sorted(range(len(one.index)), key=lambda row: places[one.index[row]])
        in_order.append(one.taken(rows))
    if any(one.tokens != first.tokens for one in in_order):
        return None  # other texts, or tokenized differently
    ours, theirs = in_order[: len(models)], in_order[len(models) :]
    whole = replace(_difference(ours, theirs), others=_further(models, others))
    kinds = sorted({kind for kind in first.kinds if kind is not None})
    if not kinds or any(one.kinds != first.kinds for one in in_order):
        return whole
    groups = {k: _difference([m.group(k) for m in ours], [o.group(k) for o in theirs]) for k in kinds}
    return replace(whole, groups=groups)


def _further(models: Sequence[Samples], others: Sequence[Samples]) -> dict[str, Paired]:
    """The differences of further metrics that all models have on the same samples in the same order."""
    first, everyone = models[0], [*models, *others]
    if any(one.index != first.index for one in everyone):
        return {}
    return {
        name: _difference(*([_alone(one.others[name]) for one in side] for side in (models, others)))
        for name, scores in first.others.items()
        if all(len(one.others.get(name, ())) == len(scores) for one in everyone)
    }


def _alone(scores: list[float]) -> Samples:
    return Samples(scores, list(range(len(scores))))


def _difference(models: Sequence[Samples], others: Sequence[Samples]) -> Paired:
    n = len(models[0].index)
    difference = _mean([one.value for one in models]) - _mean([one.value for one in others])
    parts = [
        _mean(own) - _mean(theirs)
        for own, theirs in zip(_by_sample([m.parts() for m in models]), _by_sample([o.parts() for o in others]),
                               strict=True)
    ]  # fmt: skip
    stderr = _stderr(parts)
    ours, theirs = ([_mean(row) for row in _by_sample([m.scores for m in side])] for side in (models, others))
    more = sum(one > two for one, two in zip(ours, theirs, strict=True))
    less = sum(one < two for one, two in zip(ours, theirs, strict=True))
    better, worse = (less, more) if models[0].tokens else (more, less)
    return Paired(difference, stderr, n, better, worse, sign_test(better, worse))


def _stderr(parts: Sequence[float]) -> float | None:
    """s/√n; None for a single sample, and for perplexities of broken models that overflow a float."""
    n = len(parts)
    try:
        mean = _mean(parts)
        found = math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / (n - 1) / n) if n > 1 else None
    except (OverflowError, ValueError):  # infinities of both signs
        return None
    return found if found is None or math.isfinite(found) else None


def _by_sample(columns: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*columns, strict=True))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of ``better`` against ``worse`` under a fair coin, exactly: 2·P(X ≤ the fewer), at most 1."""
    n, fewer = better + worse, min(better, worse)
    ways, term = 0, 1
    for k in range(fewer + 1):
        ways += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(2 * ways / 2**n)) if n < 1000 else min(1.0, 2.0 ** (math.log2(ways) + 1 - n))
