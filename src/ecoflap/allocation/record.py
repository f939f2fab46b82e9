"""How a search came to an allocation; kept with it, for the page that says why a layer has its sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ecoflap.allocation.checks import field
from ecoflap.errors import InvalidOption

_WHERE = "allocation: search"


@dataclass(frozen=True)
class SearchRecord:
    """What the search began with, the losses on its way, and what it last measured.

    Attributes:
        metric: what ``losses`` are: ``kl`` (nats, of the outputs to the dense model's) or ``loss``.
        losses: at the beginning and after every step that was taken.
        rounds: the round of each of them: ``start``, ``block 1``, ``layer 2 along the walk``, ``swaps``.
        given: layer name to the zeros that the search was given.
        costs: block name to what its lost weights cost by the last round's measurement, in units of ``metric``; empty
            where no round was made.
    """

    metric: str
    losses: tuple[float, ...]
    rounds: tuple[str, ...]
    given: Mapping[str, int]
    costs: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts, lists and numbers."""
        return {**vars(self), "losses": list(self.losses), "rounds": list(self.rounds)}

    @classmethod
    def from_json(cls, data: Any) -> SearchRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            InvalidOption: a field is missing or of the wrong kind.
        """
        losses, rounds = field(data, "losses", list, _WHERE), field(data, "rounds", list, _WHERE)
        given, costs = field(data, "given", dict, _WHERE), field(data, "costs", dict, _WHERE)
        if not all(map(_finite, (*losses, *costs.values()))) or not all(map(_count, given.values())):
            raise InvalidOption(f"{_WHERE}: losses and costs must be numbers, and 'given' whole ones")
        if len(losses) != len(rounds) or not losses:
            raise InvalidOption(f"{_WHERE}: {len(losses)} losses of {len(rounds)} rounds")
        return cls(
            metric=field(data, "metric", str, _WHERE),
            losses=tuple(map(float, losses)),
            rounds=tuple(map(str, rounds)),
            given=given,
            costs={name: float(cost) for name, cost in costs.items()},
        )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
