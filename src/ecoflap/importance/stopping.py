"""Stops the sampling of a layer once its standard error is at most a given share of its score."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ecoflap.errors import InvalidOption
from ecoflap.importance.base import ImportanceMeasure, Key
from ecoflap.importance.scores import summarise

LEAST = 3  # estimates of a layer: fewer give no useful standard error


@dataclass(frozen=True)
class Stopping:
    """A layer has enough estimates when their standard error is at most ``error`` times their mean.

    This is checked after every round, so two values that are equal by chance must not end the sampling. If the
    relative standard deviation of one estimate is known to be at least ``scatter`` (as for |N(0, σ)|), the standard
    error of n estimates is taken as at least ``scatter``/√n.

    Attributes:
        error: above 0 and below 1.
        scatter: smallest possible relative standard deviation of one estimate; 0 if it is unknown.
    """

    error: float
    scatter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise InvalidOption(f"importance_error must be above 0 and below 1, not {self.error}")

    @property
    def least(self) -> int:
        """The smallest sufficient number of estimates, unless all are zero."""
        return max(LEAST, math.ceil((self.scatter / self.error) ** 2 * (1 - 1e-12)))

    def is_precise_enough(self, values: Sequence[float]) -> bool:
        """Whether these estimates of one layer are sufficient; independent of their order."""
        if len(values) >= LEAST and not any(values):
            return True  # the loss does not depend on it
        if len(values) < self.least:
            return False
        found = summarise(values)
        return found.stderr <= self.error * found.score


def rounds(pieces: Iterable[Sequence[Key]]) -> list[list[Sequence[Key]]]:
    """Pieces (keys that are measured together) sorted by draw, then by batch."""
    ordered = sorted(pieces, key=_round)
    return [list(group) for _, group in groupby(ordered, key=_round)]


def _round(piece: Sequence[Key]) -> tuple[int, int]:
    _, batch, draw = piece[0]
    return draw, batch


def turns(
    pieces: Iterable[Sequence[Key]], known: Mapping[Key, float], rule: Stopping
) -> Iterator[tuple[list[Sequence[Key]], int]]:
    """For each round, the pieces that are still to be measured, and the number of estimates that are saved.

    A piece is measured while one of its layers has too few estimates in the rounds before. Other known estimates don't
    count, so that a resumed run makes the same rounds, with any number of workers.

    Args:
        known: the caller adds the measured estimates before it asks for the next round.
    """
    values: dict[str, list[float]] = {}
    for of_round in rounds(pieces):
        wanted = [
            piece for piece in of_round if any(not rule.is_precise_enough(values.get(key[0], ())) for key in piece)
        ]
        asked = [key for piece in wanted for key in piece]
        yield wanted, sum(len(piece) for piece in of_round) - len(asked)
        for key in asked:
            values.setdefault(key[0], []).append(known[key])


def stopping_of(importance: str, measure: ImportanceMeasure, error: float | None) -> Stopping | None:
    """The rule for a measure; None without ``error``.

    Raises:
        InvalidOption: ``error`` is out of range, or the measure's estimates are not sampled.
    """
    if error is None:
        return None
    if measure.scatter is None:
        raise InvalidOption(
            f"importance_error: importance {importance} is not sampled, so it has no error to stop at; it is for "
            "zeroth-order, forward-mode, gradient-norm and first-order"
        )
    return Stopping(error, measure.scatter)


def check_budget(rule: Stopping, pieces: Iterable[Sequence[Key]], batches: int) -> None:
    """Warn if even all estimates of a layer are too few for the error."""
    most = max(Counter(key[0] for piece in pieces for key in piece).values(), default=0)
    if 0 < most < rule.least:
        draws = most // batches
        warnings.warn(
            f"importance_error {rule.error:g} takes at least {rule.least} estimates per layer, and {batches} batches × "
            f"{draws} draw{'s' if draws > 1 else ''} are {most}: raise importance_samples"
            + (", or draws among the importance's options" if rule.scatter else ""),
            stacklevel=3,
        )
