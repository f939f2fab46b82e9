"""What the experts of each mixture get of their router's choices, as a row for tables and pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MixtureRow:
    """One mixture.

    Attributes:
        tokens: sent to its experts; a token counts once for each expert that is chosen for it.
        least, median, most: shares of ``tokens`` that one expert gets.
        idle: names of the experts that get none, without that of the mixture.
    """

    name: str
    experts: int
    tokens: int
    least: float
    median: float
    most: float
    idle: tuple[str, ...]


def mixture_rows(experts: Mapping[str, Mapping[str, int]]) -> list[MixtureRow]:
    """A row for each mixture of ``experts``, which maps it to the tokens of each of its experts."""
    rows = []
    for name, counts in experts.items():
        ordered, total = sorted(counts.values()), max(1, sum(counts.values()))
        least, median, most = (ordered[place] / total for place in (0, len(ordered) // 2, -1))
        idle = tuple(expert.removeprefix(name).strip(".[]") for expert, count in counts.items() if not count)
        rows.append(MixtureRow(name, len(ordered), sum(ordered), least, median, most, idle))
    return rows
