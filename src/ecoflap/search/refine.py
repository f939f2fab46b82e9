"""Searches the allocation with the least measured loss: cost every part, solve for the best shares, step, measure.

"Sensitivity" allocation is this search; nothing in it is from one paper. What it builds on: measuring blocks pruned by
the criterion itself and solving for levels (as SPDY, arXiv 2201.13096, and EvoPress, arXiv 2410.14649), with the costs
taken at the present allocation, so that blocks interact, and the shape of the curves from the layers' local errors.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.calibration.objectives import Objective, on_device
from ecoflap.errors import InvalidOption
from ecoflap.network.cache import cache_disabled
from ecoflap.network.parts import Anatomy
from ecoflap.network.replay import Replay
from ecoflap.network.trace import evaluating
from ecoflap.progress import Progress, Silent, Task
from ecoflap.registry import unknown
from ecoflap.search.attribution import by_gradient, by_probes
from ecoflap.search.divergence import METRICS, Divergence
from ecoflap.search.masked import MaskedModel
from ecoflap.search.order import Order, local_errors
from ecoflap.search.shares import Budgets, Shares, between, budgets_of, flattened
from ecoflap.workers import ALONE, Workers

BY = ("probes", "gradient")
WEIGHTS = ("own", "masked")
PHASES = {"block": ("block",), "kind": ("block", "kind"), "layer": ("block", "layer")}
STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the way to the solution, tried in turns until a shorter one is no better
_SWAP = 0.02  # of the smaller layer's weights


@dataclass(frozen=True)
class SearchOptions:
    """How the search goes.

    Attributes:
        by: what costs are found with: ``probes`` (forward passes alone, one a unit and batch, replayed up to it) or
            ``gradient`` (one backward pass a batch for all).
        granularity: what gets a share of its own in the end: ``block``, ``kind`` (blocks, then a factor for each kind
            of matrix in a tower) or ``layer``. With ``probes``, ``layer`` takes a probe for every matrix.
        metric: ``kl`` (of the outputs to the dense model's), ``loss``, or ``auto``.
        rounds: most rounds for blocks, and as many again for what follows; 0 leaves the allocation as it is.
        tolerance: a round that lowers the loss by less than this part of it is the last.
        weights: what is measured for a criterion that updates the weights it keeps: its ``own``, or Wanda's ``masked``
            ones, which are cheap and the same for all criteria that read inputs.
        samples: the search uses the first whole batches with so many calibration samples; 0 takes all.
        swaps: at the end, so many tries to move 2 % of a layer's zeros to another one, kept where the loss falls.
    """

    by: str = "gradient"
    granularity: str = "layer"
    metric: str = "auto"
    rounds: int = 8
    tolerance: float = 0.005
    weights: str = "own"
    samples: int = 0
    swaps: int = 0

    def __post_init__(self) -> None:
        choices = (("by", BY), ("granularity", tuple(PHASES)), ("metric", METRICS), ("weights", WEIGHTS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), list(known))
        for name in ("rounds", "samples", "swaps"):
            if getattr(self, name) < 0:
                raise InvalidOption(f"{name} of the search must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.tolerance < 1:
            raise InvalidOption(f"the search's tolerance must be from 0 to 1, not {self.tolerance}")


@dataclass(frozen=True)
class State:
    """Where the search stands.

    Attributes:
        phase: number of the phase, 0 for blocks; ``round`` rounds of it are done, ``swaps`` swaps were tried.
        zeros: layer name to its zeros; ``loss`` is what was measured there.
        scales: log of each layer's scale, averaged over the rounds of this phase; empty at its beginning.
        step: the longest step that the next round tries: twice the one that was best in the last round.
        history: the loss at the beginning and after every step that was taken.
    """

    zeros: Mapping[str, int]
    loss: float
    phase: int = 0
    round: int = 0
    swaps: int = 0
    scales: Mapping[str, float] | None = None
    step: float = STEPS[0]
    history: tuple[float, ...] = ()

    def steps(self, rounds: int) -> int:
        """Of the progress: so many are behind, where a phase has at most so many rounds."""
        return self.phase * rounds + self.round + self.swaps

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        return cls(**{**data, "history": tuple(data["history"])})


class SearchJournal(Protocol):
    """Where the search keeps its state after every round."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any]) -> None: ...


class _NoJournal:
    def load(self) -> dict[str, Any] | None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Found:
    """The allocation that the search ended with, the losses on the way, and what they are measured in."""

    allocation: Allocation
    history: tuple[float, ...]
    metric: str


def refine(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    order: Order,
    *,
    loss: Objective,
    shares: Mapping[str, Any],
    options: SearchOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    journal: SearchJournal | None = None,
    workers: Workers = ALONE,
) -> Found:
    """Improve ``allocation`` by measuring the model masked by it. The model is as before afterwards.

    Each round finds what every part costs at the present allocation, scales the layers' local errors to that, solves
    for the shares with the least predicted loss under budget and caps, and steps towards them as far as the measured
    loss falls. So the result is never worse than the start, on these batches and with these masks; the criterion then
    prunes in its own way, block by block.

    Args:
        allocation: where to begin.
        batches: to measure on.
        order: in which the criterion removes weights.
        loss: objective; also the measure, where the outputs' divergence can't be.
        shares: options of the allocation: sparsity, max_sparsity, min_sparsity, budget, tower_sparsity.
        seed: of the swaps.
        journal: state of an interrupted search, and where the new one goes; the same for all workers.
        workers: those who have model and batches alike; each runs a share of the batches.

    Raises:
        InvalidOption: the model can't be differentiated, or has no logits for ``metric=kl``.
        NonFiniteLoss: a loss is NaN or infinite.
    """
    options = options or SearchOptions()
    journal = journal or _NoJournal()
    names = ("sparsity", "max_sparsity", "min_sparsity", "budget", "tower_sparsity")
    limits = {name: shares[name] for name in names if name in shares}
    with ExitStack() as state:
        for context in (evaluating(model), cache_disabled(model)):
            state.enter_context(context)
        divergence = Divergence(model, batches, on_device(loss), options.metric, workers)
        divergence.record()
        steps = len(PHASES[options.granularity]) * options.rounds + options.swaps
        kept = journal.load()
        begun = State.from_json(kept) if kept else None
        done = 0 if begun is None else begun.steps(options.rounds)
        task = state.enter_context((progress or Silent()).stage("allocation search", total=steps, done=done))
        masked = state.enter_context(MaskedModel(model, anatomy))
        replay = state.enter_context(Replay(model, anatomy.replayable))
        search = _Search(
            model, anatomy, order, Shares(anatomy.layers, local_errors(model, anatomy, order), limits),
            budgets_of(allocation, limits), divergence, masked, replay, options, journal.save, task,
        )  # fmt: skip
        here = begun or search.start(allocation)
        here = search.swapped(search.settled(here), seed)
    rows = tuple(replace(row, zeros=here.zeros[row.name]) for row in allocation.layers)
    single = options.granularity != "block" or options.swaps or allocation.granularity == "layer"
    granularity = "layer" if single else "block"
    found = replace(allocation, layers=rows, granularity=granularity, max_sparsity=_highest(allocation, limits))
    return Found(found, here.history, divergence.metric)


def _highest(allocation: Allocation, limits: Mapping[str, Any]) -> float:
    cap = limits.get("max_sparsity")
    return 1.0 if cap is None else float(cap)


@dataclass
class _Search:
    model: nn.Module
    anatomy: Anatomy
    order: Order
    shares: Shares
    budgets: Budgets
    divergence: Divergence
    masked: MaskedModel
    replay: Replay
    options: SearchOptions
    save: Callable[[dict[str, Any]], None]
    task: Task

    def start(self, allocation: Allocation) -> State:
        """The given allocation, or the same sparsity for all layers of a budget where that measures lower.

        Blocks interact: what looks best for each alone can be far off together.
        """
        given = {row.name: row.zeros for row in allocation.layers}
        flat = flattened(given, self.shares.layers, self.budgets)
        loss, zeros = self._measure(given), given
        if flat != given and (other := self._measure(flat)) < loss:
            loss, zeros = other, flat
        return State(zeros, loss, history=(loss,))

    def settled(self, here: State) -> State:
        """Rounds of every phase, until one gains too little."""
        phases = PHASES[self.options.granularity]
        done = here.steps(self.options.rounds)
        while here.phase < len(phases):
            at = f"{phases[here.phase]} {here.round + 1}"
            if here.round < self.options.rounds:
                before = here.loss
                here = self._round(here, phases[here.phase])
            if here.round >= self.options.rounds or before - here.loss < self.options.tolerance * before:
                here = replace(here, phase=here.phase + 1, round=0, scales=None, step=STEPS[0])
            self.save(here.to_json())
            self.task.advance(here.steps(self.options.rounds) - done, at)  # a phase that ends early skips its rest
            done = here.steps(self.options.rounds)
        return here

    def _round(self, here: State, phase: str) -> State:
        self._mask(here.zeros)
        fresh = self.shares.scales(here.zeros, *self._costs(phase))
        # The average with earlier rounds evens out noise and swings between two; where it leads nowhere, this round's
        # own costs may.
        former = here.scales or fresh
        averaged = {name: (value + former[name]) / 2 for name, value in fresh.items()}
        for scales in (averaged,) if averaged == fresh else (averaged, fresh):
            best = self._stepped(here, self.shares.best(scales, "block" if phase == "block" else "layer"))
            if best is not here:
                break
        return replace(best, round=here.round + 1, scales=scales)

    def _stepped(self, here: State, goal: Mapping[str, int]) -> State:
        """The best step from ``here`` towards ``goal``; ``here`` itself if none lowers the loss."""
        best = here
        for step in (length for length in STEPS if length <= here.step):
            zeros = between(here.zeros, goal, step, self.budgets)
            loss = self._measure(zeros)
            if loss >= best.loss and best is not here:
                break
            if loss < best.loss:
                longest = min(2 * step, STEPS[0])
                best = replace(here, zeros=zeros, loss=loss, step=longest, history=(*here.history, loss))
        return best

    def _costs(self, phase: str) -> tuple[dict[str, float], dict[str, float] | None, dict[str, float] | None]:
        """Of the blocks, and as the phase needs them of the kinds and layers."""
        blocks, kinds, layers = self.shares.blocks, self.shares.kinds, {x.name: [x] for x in self.anatomy.layers}
        if self.options.by == "gradient":
            costs = by_gradient(self.model, self.masked, self.divergence, self.anatomy.layers, self.anatomy.replayable)
            sums = [
                {name: math.fsum(costs[one.name] for one in members) for name, members in units.items()}
                for units in (blocks, kinds)
            ]
            return sums[0], None if phase == "block" else sums[1], costs if phase == "layer" else None

        def probed(units: Mapping[str, Sequence[Any]]) -> dict[str, float]:
            return by_probes(self.masked, self.replay, self.divergence, units)

        return (
            probed(blocks),
            None if phase == "block" else probed(kinds),
            probed(layers) if phase == "layer" else None,
        )

    def swapped(self, here: State, seed: int) -> State:
        """Single moves of zeros from one layer to another, taken where the measured loss falls."""
        cap, floor = self.shares.options.get("max_sparsity"), self.shares.options.get("min_sparsity") or 0.0
        sizes = {layer.name: layer.numel for layer in self.anatomy.layers}
        while here.swaps < self.options.swaps:
            names, giver, taker = self._pair(seed, here.swaps)
            amount = max(1, round(_SWAP * min(sizes[giver], sizes[taker])))
            amount = min(amount, here.zeros[giver] - math.ceil(floor * sizes[giver]),
                         math.floor((1.0 if cap is None else cap) * sizes[taker]) - here.zeros[taker])  # fmt: skip
            here = replace(here, swaps=here.swaps + 1)
            if len(names) > 1 and giver != taker and amount > 0:
                zeros = {**here.zeros, giver: here.zeros[giver] - amount, taker: here.zeros[taker] + amount}
                loss = self._measure(zeros)
                if loss < here.loss:
                    here = replace(here, zeros=zeros, loss=loss, history=(*here.history, loss))
            self.save(here.to_json())
            self.task.advance(1, "swaps")
        return here

    def _pair(self, seed: int, number: int) -> tuple[Sequence[str], str, str]:
        """Two layers of one budget, by (seed, number) alone, so that a resumed search goes on as it would have."""
        digest = hashlib.sha256(f"ecoflap swap {seed} {number}".encode()).digest()
        draw = random.Random(int.from_bytes(digest[:8], "big"))
        names = draw.choices(self.budgets, weights=[len(budget) for budget in self.budgets])[0]
        giver, taker = draw.choice(names), draw.choice(names)
        return names, giver, taker

    def _measure(self, zeros: Mapping[str, int]) -> float:
        self._mask(zeros)

        def value(index: int) -> float:
            self.replay.reset()  # its memory is of one batch, and of other masks
            return self.divergence.value(index)

        values = self.divergence.each(value)
        return math.fsum(values) / len(values)

    def _mask(self, zeros: Mapping[str, int]) -> None:
        self.masked.set(
            {layer: self.order.stand_in(self.model, layer, zeros[layer.name]) for layer in self.anatomy.layers}
        )
