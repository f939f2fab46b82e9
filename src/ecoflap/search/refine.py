"""Searches the allocation with the least measured loss: cost every part, solve for the best shares, step, measure.

"Sensitivity" allocation is this search; nothing in it is from one paper. What it builds on: measuring blocks pruned by
the criterion itself and solving for levels (as SPDY, arXiv 2201.13096, and EvoPress, arXiv 2410.14649), with the costs
taken at the present allocation, so that blocks interact, and the shape of the curves from the layers' local errors.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.calibration.objectives import Objective, on_device
from ecoflap.network.cache import cache_disabled
from ecoflap.network.parts import Anatomy
from ecoflap.network.replay import Replay
from ecoflap.network.trace import evaluating
from ecoflap.progress import Progress, Silent, Task
from ecoflap.search.attribution import by_gradient, by_probes
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked import MaskedModel
from ecoflap.search.order import Order, local_errors
from ecoflap.search.orders import Orders
from ecoflap.search.shares import Budgets, Shares, between, budgets_of, filled, flattened
from ecoflap.search.state import PHASES, NoJournal, SearchJournal, SearchOptions, State
from ecoflap.workers import ALONE, Workers

STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the way to the solution, tried in turns until a shorter one is no better
_SWAP = 0.02  # of the smaller layer's weights


Costs = tuple[dict[str, float], dict[str, float] | None, dict[str, float] | None, Collection[str]]


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
    order: Order | Orders,
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
        order: in which the criterion removes weights; or what finds it, where it depends on inputs.
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
    journal = journal or NoJournal()
    names = ("sparsity", "max_sparsity", "min_sparsity", "budget", "tower_sparsity")
    limits = {name: shares[name] for name in names if name in shares}
    if options.budget == "global":
        limits["budget"] = "global"
    with ExitStack() as state:
        for context in (evaluating(model), cache_disabled(model)):
            state.enter_context(context)
        divergence = Divergence(model, batches, on_device(loss), options.metric, options.positions, workers)
        divergence.record()
        walking = {"dense": (False,), "pruned": (True,), "both": (False, True)}[options.inputs]
        phases = [(name, by_walks) for by_walks in walking for name in PHASES[options.granularity]]
        steps = len(phases) * options.rounds + options.swaps
        kept = journal.load()
        begun = State.from_json(kept) if kept else None
        done = 0 if begun is None else begun.steps(options.rounds)
        task = state.enter_context((progress or Silent()).stage("allocation search", total=steps, done=done))
        masked = state.enter_context(MaskedModel(model, anatomy))
        replay = state.enter_context(Replay(model, anatomy.replayable))
        search = _Search(
            model, anatomy, order, limits, budgets_of(allocation, limits), phases, divergence, masked, replay, options,
            journal.save, task, {row.name: row.zeros for row in allocation.layers},
        )  # fmt: skip
        here = begun or search.start()
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
    orders: Order | Orders
    limits: Mapping[str, Any]
    budgets: Budgets
    phases: Sequence[tuple[str, bool]]  # with its name, whether a phase goes by the inputs in the pruned model
    divergence: Divergence
    masked: MaskedModel
    replay: Replay
    options: SearchOptions
    save: Callable[[dict[str, Any]], None]
    task: Task
    given: Mapping[str, int]
    order: Order | None = None
    _shares: Shares | None = None  # of the present order
    _at: Mapping[str, int] | None = None  # where the order was found; None: in the dense model
    _zeros: Mapping[str, int] | None = None  # what the model computes with, by the present order

    def start(self) -> State:
        """The given allocation, or the same sparsity for all layers of a budget where that measures lower.

        Blocks interact: what looks best for each alone can be far off together.
        """
        self._in_dense()
        flat = flattened(self.given, self.anatomy.layers, self.budgets)
        loss, zeros = self._measure(self.given), self.given
        if flat != self.given and (other := self._measure(flat)) < loss:
            loss, zeros = other, flat
        return State(zeros, loss, history=(loss,))

    def _in_dense(self) -> None:
        """From here on the order is that of the dense model."""
        if self.order is None:
            self._order_is(self.orders if isinstance(self.orders, Order) else self.orders.dense())

    def _in_pruned(self, zeros: Mapping[str, int]) -> None:
        """From here on the order is that of the model pruned to ``zeros``, and it computes with those weights."""
        if zeros != self._at and isinstance(self.orders, Orders):
            self.order = None  # Hessians are large: two sets of them need not exist at once
            with self.replay.forcing(*self.anatomy.replayable):
                self._order_is(self.orders.along(zeros, self.masked))
            self._zeros = zeros
        self._at = zeros

    def _walked(self, zeros: Mapping[str, int]) -> float:
        self._in_pruned(zeros)
        return self._measure(zeros)

    def _order_is(self, order: Order) -> None:
        self.order, self._zeros, self._shares = order, None, None

    @property
    def shares(self) -> Shares:
        """By the present order. Found when it is asked for: of a walk that only a loss is wanted of, nobody does."""
        if self._shares is None:
            assert self.order is not None
            errors = local_errors(self.model, self.anatomy, self.order)
            self._shares = Shares(self.anatomy.layers, errors, self.limits)
        return self._shares

    def settled(self, here: State) -> State:
        """Rounds of every phase, until one gains too little."""
        done = here.steps(self.options.rounds)
        while here.phase < len(self.phases):
            phase, walking = self.phases[here.phase]
            at = f"{phase} {here.round + 1}" + " along the walk" * walking
            if not walking:
                self._in_dense()
            elif here.round == 0 and not (here.phase and self.phases[here.phase - 1][1]):
                here = self._compared(here)
            if here.round < self.options.rounds:
                before = here.loss
                here = self._round(here, phase, walking)
            if here.round >= self.options.rounds or before - here.loss < self.options.tolerance * before:
                here = replace(here, phase=here.phase + 1, round=0, scales=None, step=STEPS[0])
            self.save(here.to_json())
            self.task.advance(here.steps(self.options.rounds) - done, at)  # a phase that ends early skips its rest
            done = here.steps(self.options.rounds)
        return here

    def _compared(self, here: State) -> State:
        """With a walk to each: where the search by dense inputs has ended, or the given allocation."""
        candidates = [here.zeros] if self.given == here.zeros else [self.given, here.zeros]
        loss, zeros = min(((self._walked(zeros), zeros) for zeros in candidates), key=lambda found: found[0])
        return replace(here, zeros=zeros, loss=loss, history=(*here.history, loss))

    def _round(self, here: State, phase: str, walking: bool) -> State:
        if walking:
            self._in_pruned(here.zeros)
        self._mask(here.zeros)
        blocks, kinds, layers, idle = self._costs(phase)
        fresh = self.shares.scales(here.zeros, blocks, kinds, layers)
        # The average with earlier rounds evens out noise and swings between two; where it leads nowhere, this round's
        # own costs may.
        former = here.scales or fresh
        averaged = {name: (value + former[name]) / 2 for name, value in fresh.items()}
        tried = (averaged,) if averaged == fresh else (averaged, fresh)
        unit = "block" if phase == "block" else "layer"
        # Solved for before any step: a walk brings errors of its own.
        goals = [(scales, self.shares.best(scales, unit)) for scales in tried]
        here = self._emptied(here, idle, walking)
        best, kept = here, fresh
        for scales, goal in goals:
            best, kept = self._stepped(here, goal, walking), scales
            if best is not here:
                break
        return replace(best, round=here.round + 1, scales=kept)

    def _emptied(self, here: State, idle: Collection[str], walking: bool) -> State:
        """Idle layers at the cap, if the loss is lower then: no part of the way to that is better than all of it."""
        assert self.order is not None
        # An expert that no token reached costs nothing here and may elsewhere; so may a layer that lost but zeros.
        known = {
            layer.name
            for layer in self.anatomy.layers
            if layer.name in idle
            and layer.name in self.order.norms
            and self.shares.error(layer, here.zeros[layer.name])
        }
        cap, floor = self.limits.get("max_sparsity"), self.limits.get("min_sparsity") or 0.0
        zeros = filled(here.zeros, known, self.anatomy.layers, self.budgets, cap, floor)
        if zeros == here.zeros:
            return here
        loss = self._walked(zeros) if walking else self._measure(zeros)
        return replace(here, zeros=zeros, loss=loss, history=(*here.history, loss)) if loss < here.loss else here

    def _stepped(self, here: State, goal: Mapping[str, int], walking: bool) -> State:
        """The best step from ``here`` towards ``goal``; ``here`` itself if none lowers the loss."""
        best = here
        for step in (length for length in STEPS if length <= here.step):
            zeros = between(here.zeros, goal, step, self.budgets)
            loss = self._walked(zeros) if walking else self._measure(zeros)
            if loss >= best.loss and best is not here:
                break
            if loss < best.loss:
                longest = min(2 * step, STEPS[0])
                best = replace(here, zeros=zeros, loss=loss, step=longest, history=(*here.history, loss))
        return best

    def _costs(self, phase: str) -> Costs:
        """Of the blocks, and as the phase needs them of the kinds and layers; last, the layers that cost exactly 0.

        No output depends on those: they lie behind the block whose features are taken from a vision tower.
        """
        blocks, kinds, layers = self.shares.blocks, self.shares.kinds, {x.name: [x] for x in self.anatomy.layers}
        if self.options.by == "gradient":
            costs = by_gradient(self.model, self.masked, self.divergence, self.anatomy.layers, self.anatomy.replayable)
            sums = [
                {name: math.fsum(costs[one.name] for one in members) for name, members in units.items()}
                for units in (blocks, kinds)
            ]
            idle = {name for name, cost in costs.items() if cost == 0}
            return sums[0], None if phase == "block" else sums[1], costs if phase == "layer" else None, idle

        def probed(units: Mapping[str, Sequence[Any]]) -> dict[str, float]:
            return by_probes(self.masked, self.replay, self.divergence, units)

        of_blocks = probed(blocks)
        return (
            of_blocks,
            None if phase == "block" else probed(kinds),
            probed(layers) if phase == "layer" else None,
            {one.name for block, members in blocks.items() if of_blocks[block] == 0 for one in members},
        )

    def swapped(self, here: State, seed: int) -> State:
        """Single moves of zeros from one layer to another, taken where the measured loss falls."""
        cap, floor = self.limits.get("max_sparsity"), self.limits.get("min_sparsity") or 0.0
        sizes = {layer.name: layer.numel for layer in self.anatomy.layers}
        while here.swaps < self.options.swaps:
            self._in_dense()
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
        if zeros == self._zeros:
            return
        self._zeros = zeros
        assert self.order is not None
        self.masked.set(
            {layer: self.order.stand_in(self.model, layer, zeros[layer.name]) for layer in self.anatomy.layers}
        )
