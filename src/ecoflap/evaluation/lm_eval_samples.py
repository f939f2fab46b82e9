"""Reads the scores of single samples from lm-eval's logs, so that two models can be compared on the same samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logged:
    """One metric of the samples of one or several tasks, in the order of the tasks and of their documents.

    Attributes:
        scores: more is better; with ``tokens``, negative log-likelihoods per word, byte or document.
        tokens: number of words or bytes of each sample, its weight; empty for scores.
        kinds: the group's member that each sample belongs to; empty if there is no group.
    """

    scores: list[float]
    tokens: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


def logged(found: Mapping[str, Any], leaves: Mapping[str, str | None], metric: str, kind: str) -> Logged | None:
    """The values of ``metric`` after the filter ``kind``; None if a task logs no numbers, or if less is better.

    Args:
        found: lm-eval's result.
        leaves: from task to its member of the requested group; None if no group was requested.
    """
    values: list[Any] = []
    kinds: list[str] = []
    for leaf, member in leaves.items():
        rows = [row for row in found.get("samples", {}).get(leaf, ()) if row.get("filter") == kind and metric in row]
        if not rows:
            return None
        values += [row[metric] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        kinds += [] if member is None else [member] * len(rows)
    if "perplexity" in metric:
        return _of_perplexity(values, kinds)
    more = all(found.get("higher_is_better", {}).get(leaf, {}).get(metric) is True for leaf in leaves)
    if not more or not all(isinstance(value, int | float) for value in values):
        return None
    return Logged([float(value) for value in values], [], kinds)


def _of_perplexity(values: Sequence[Any], kinds: list[str]) -> Logged | None:
    """From log-likelihoods, or pairs of a log-likelihood and its number of words or bytes."""
    pairs = [value if isinstance(value, tuple | list) else (value, 1) for value in values]
    if not all(len(pair) == 2 and isinstance(pair[0], int | float) and pair[1] >= 1 for pair in pairs):
        return None
    return Logged([-total / count for total, count in pairs], [int(count) for _, count in pairs], kinds)


def leaves_of(found: Mapping[str, Any], name: str) -> dict[str, str | None]:
    """The tasks with samples in the group ``name``, each with the member of the group that contains it."""
    groups = found.get("group_subtasks", {})

    def under(member: str) -> Iterator[str]:
        inner = [one for one in groups.get(member, ()) if one != member]
        for one in inner:
            yield from under(one)
        if not inner:
            yield member

    members = [member for member in groups.get(name, ()) if member != name]
    return {leaf: member for member in members for leaf in under(member)} if members else {name: None}
