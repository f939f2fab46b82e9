"""The experts' shares of their router's choices, as one row per mixture for tables and pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MixtureRow:
    """One mixture.

    Attributes:
        tokens: sent to its experts; a token counts once for each of its experts.
        least, median, most: shares of ``tokens`` of one expert.
        idle: names of the experts without tokens, relative to the mixture.
    """

    name: str
    experts: int
    tokens: int
    least: float
    median: float
    most: float
    idle: tuple[str, ...]


def mixture_rows(experts: Mapping[str, Mapping[str, int]]) -> list[MixtureRow]:
    """One row per mixture; ``experts`` has the tokens by mixture and expert."""
    rows = []
    for name, counts in experts.items():
        ordered, total = sorted(counts.values()), max(1, sum(counts.values()))
        least, median, most = (ordered[place] / total for place in (0, len(ordered) // 2, -1))
        idle = tuple(expert.removeprefix(name).strip(".[]") for expert, count in counts.items() if not count)
        rows.append(MixtureRow(name, len(ordered), sum(ordered), least, median, most, idle))
    return rows
