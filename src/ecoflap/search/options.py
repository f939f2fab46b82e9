"""Defines the options of a search, its state after a round, and the file of that state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ecoflap.errors import InvalidOption
from ecoflap.search.divergence import METRICS, POSITIONS
from ecoflap.support.ranges import check_count
from ecoflap.support.registry import unknown

BY = ("probes", "gradient")
INPUTS = ("dense", "pruned", "both")
BUDGETS = ("given", "global")
WEIGHTS = ("own", "masked")
PHASES = {"block": ("block",), "kind": ("block", "kind"), "layer": ("block", "layer")}
CHOICES: Mapping[str, Collection[str]] = {
    "by": BY, "granularity": PHASES, "metric": METRICS, "positions": POSITIONS, "weights": WEIGHTS, "inputs": INPUTS,
    "budget": BUDGETS,
}  # fmt: skip


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search.

    Attributes:
        by: how costs are measured: ``probes`` (only forward passes, one for each unit and batch, with replay) or
            ``gradient`` (one backward pass for each batch).
        granularity: the units with their own sparsity at the end: ``block``, ``kind`` (blocks, then a factor for each
            kind of matrix in a tower) or ``layer``. With ``probes``, ``layer`` takes a probe for every matrix.
        metric: ``kl`` (of the outputs to the dense model's), ``loss``, or ``auto``.
        positions: where ``kl`` compares outputs: at ``labels``, or over the whole ``text``, questions and prompts
            included.
        rounds: most rounds for blocks, and the same number for later phases; 0 does not change the allocation.
        tolerance: the search ends after a round that lowers the loss by less than this share of it.
        weights: the weights to measure for a criterion that updates the kept weights: its ``own``, or Wanda's
            ``masked`` ones, which are fast and the same for all criteria that read inputs.
        inputs: the inputs that decide which weights a layer loses: those in the ``dense`` model, or in the ``pruned``
            one, as in stage 2: then every step is measured after a walk over all calibration samples. ``both`` searches
            by ``dense`` first, then by ``pruned`` from there, or from the given allocation if a walk shows that it is
            better.
        budget: the ``given`` one of the allocation, or ``global``: start within a budget for each tower, but also move
            weights between towers.
        samples: number of calibration samples for the search (the first whole batches); 0 takes all.
        swaps: number of attempts at the end to move 2 % of a layer's zeros to another one, kept if the loss falls.
    """

    by: str = "gradient"
    granularity: str = "layer"
    metric: str = "auto"
    positions: str = "labels"
    rounds: int = 8
    tolerance: float = 0.005
    weights: str = "own"
    inputs: str = "dense"
    budget: str = "given"
    samples: int = 0
    swaps: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), list(known))
        check_count("rounds of the search", self.rounds, least=0)
        check_count("samples of the search", self.samples, least=0, most=2**31)
        check_count("swaps of the search", self.swaps, least=0)
        if self.swaps and self.inputs != "dense":
            raise InvalidOption("the search's swaps need inputs=dense: a walk for each would take too long")
        if not 0 <= self.tolerance < 1:
            raise InvalidOption(f"the search's tolerance must be from 0 to 1, not {self.tolerance}")


@dataclass(frozen=True)
class State:
    """The state of the search.

    Attributes:
        phase: number of the phase, 0 for blocks; ``round`` rounds of it are done, ``swaps`` swaps were tried.
        zeros: number of zeros by layer name; ``loss`` was measured with them.
        scales: log of each layer's scale, averaged over the rounds of this phase; empty at its start.
        step: the longest step of the next round: twice the best one of the last round, but at most the first one of a
            phase.
        history: the loss at the start and after every accepted step.
        rounds: the name of the round of each of these losses.
        costs: cost in the last round by block name.
    """

    zeros: Mapping[str, int]
    loss: float
    phase: int = 0
    round: int = 0
    swaps: int = 0
    scales: Mapping[str, float] | None = None
    step: float = 1.0
    history: tuple[float, ...] = ()
    rounds: tuple[str, ...] = ()
    costs: Mapping[str, float] | None = None

    def moved(self, zeros: Mapping[str, int], loss: float, at: str) -> State:
        """The state after a step to ``zeros`` in the round ``at``."""
        return replace(self, zeros=zeros, loss=loss, history=(*self.history, loss), rounds=(*self.rounds, at))

    def steps(self, rounds: int) -> int:
        """Number of progress steps that are done, if a phase has at most ``rounds`` rounds."""
        return self.phase * rounds + self.round + self.swaps

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        return cls(**{**data, **{name: tuple(data[name]) for name in ("history", "rounds")}})


class SearchJournal(Protocol):
    """Saves the state of the search after every round."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any]) -> None: ...


class NoJournal:
    def load(self) -> dict[str, Any] | None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass
