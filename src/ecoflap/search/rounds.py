"""Runs the rounds of a search: measures the cost of every part, solves for the best shares, makes a step."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from ecoflap.model.parts import Anatomy
from ecoflap.search.costs import by_gradient, by_probes
from ecoflap.search.options import SearchOptions, State
from ecoflap.search.pruned_model import PrunedModel
from ecoflap.search.solve import Budgets, Shares, between, filled, flattened
from ecoflap.support.progress import Task

_log = logging.getLogger("ecoflap")

# How far a sparsity may move, tried in turns until a shorter one is no better; and where each try costs a walk.
STEPS = (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625)
WALKED_STEPS = (0.1, 0.05, 0.025)
PARTS = (0.5, 0.25, 0.125, 0.0625)  # of the way to the best shares wherever they lie; tried where no such step helps
_FINE = 0.05  # a shorter step is a part of this one: local errors are known at every 2 % of the weights
_SWAP = 0.02  # of the smaller layer's weights

Goal = Callable[[float], Mapping[str, int]]  # from the length of a step to the best shares within it
Costs = tuple[dict[str, float], dict[str, float] | None, dict[str, float] | None, Collection[str]]


@dataclass
class Search:
    """Improves a given allocation round by round until its measured loss stops falling.

    Attributes:
        pruned: prunes and measures the model.
        limits: sparsity, max_sparsity, min_sparsity, budget, tower_sparsity, if given.
        budgets: which every step keeps.
        phases: name of each, and whether it uses the inputs in the pruned model.
        save: receives the state after every round.
        task: progress; also shows the current measurement, because a round can take minutes.
        given: zeros at the start.
    """

    pruned: PrunedModel
    limits: Mapping[str, Any]
    budgets: Budgets
    phases: Sequence[tuple[str, bool]]
    options: SearchOptions
    save: Callable[[dict[str, Any]], None]
    task: Task
    given: Mapping[str, int]
    _shares: Shares | None = None
    _at_work: str = "start"  # the round

    @property
    def anatomy(self) -> Anatomy:
        """The model's anatomy."""
        return self.pruned.anatomy

    @property
    def shares(self) -> Shares:
        """The solver for the current order."""
        errors = self.pruned.errors
        if self._shares is None or self._shares.errors is not errors:
            self._shares = Shares(self.anatomy.layers, errors, self.limits)
        return self._shares

    def start(self) -> State:
        """The given allocation, or the uniform one within each budget if its measured loss is lower.

        Blocks interact, so that the best sparsity of each single block can be bad for the model. Both are measured as
        in the first phase.
        """
        walking = self.phases[0][1]
        if not walking:
            self._tell("statistics")
            self.pruned.by_dense()
        flat = flattened(self.given, self.anatomy.layers, self.budgets)
        candidates = [self.given] if flat == self.given else [self.given, flat]
        losses = [
            self._measured(zeros, name, walking) for zeros, name in zip(candidates, ("given", "even"), strict=False)
        ]
        best = losses.index(min(losses))
        _log.info("search: begins with loss %.4g", losses[best])
        begun = State(candidates[best], losses[best], step=self._steps(0)[0])
        return begun.moved(candidates[best], losses[best], self._at_work)

    def settled(self, here: State) -> State:
        """Run the rounds of every phase, until a round gains too little."""
        done = here.steps(self.options.rounds)
        while here.phase < len(self.phases):
            phase, walking = self.phases[here.phase]
            self._at_work = f"{phase} {here.round + 1}" + " along the walk" * walking
            if not walking:
                self.pruned.by_dense()
            elif here.round == 0 and here.phase and not self.phases[here.phase - 1][1]:
                here = self._compared(here)
            if here.round < self.options.rounds:
                before = here.loss
                here = self._round(here, phase, walking)
                _log.info("search: %s: loss %.4g to %.4g", self._at_work, before, here.loss)
            if here.round >= self.options.rounds or before - here.loss < self.options.tolerance * before:
                following = here.phase + 1
                here = replace(here, phase=following, round=0, scales=None, step=self._steps(following)[0])
            self.save(here.to_json())
            behind = here.steps(self.options.rounds)  # a phase that ends early skips its rest
            self.task.advance(behind - done, self._at_work)
            done = behind
        return here

    def _steps(self, phase: int) -> Sequence[float]:
        return WALKED_STEPS if phase < len(self.phases) and self.phases[phase][1] else STEPS

    def _compared(self, here: State) -> State:
        """The better one of the search's result by dense inputs and the given allocation, measured by walks."""
        candidates = [here.zeros] if self.given == here.zeros else [self.given, here.zeros]
        losses = ((self._measured(zeros, "begin", walking=True), zeros) for zeros in candidates)
        loss, zeros = min(losses, key=lambda found: found[0])
        return here.moved(zeros, loss, self._at_work)

    def _round(self, here: State, phase: str, walking: bool) -> State:
        self._tell("costs")
        self.pruned.prune(here.zeros, walking=walking)
        blocks, kinds, layers, idle = self._costs(phase)
        fresh = self.shares.scales(here.zeros, blocks, kinds, layers)
        # The average with earlier rounds evens out noise and oscillations; if it does not help, this round's own costs
        # may, but they are not worth more walks.
        former = here.scales or fresh
        averaged = {name: (value + former[name]) / 2 for name, value in fresh.items()}
        tried = (averaged,) if walking or averaged == fresh else (averaged, fresh)
        unit, shares = "block" if phase == "block" else "layer", self.shares  # a walk gives new local errors
        begin = self._emptied(here.zeros, idle)  # with walks it is measured only with the step, to save a walk
        if begin != here.zeros and not walking:
            loss = self._measured(begin, "unread layers empty")
            here = here.moved(begin, loss, self._at_work) if loss < here.loss else here
            begin = here.zeros
        best, kept = here, averaged
        for within, scales in itertools.product((True,) if walking else (True, False), tried):
            steps = [length for length in self._steps(here.phase) if length <= here.step] if within else PARTS
            goal = cache(partial(shares.best, scales, unit, begin))  # several steps may have the same goal
            towards = partial(self._near if within else self._part, goal, begin)
            best, kept = self._stepped(here, towards, steps, walking), scales
            if best is not here:
                break
        return replace(best, round=here.round + 1, scales=kept, costs=blocks)

    def _emptied(self, zeros: Mapping[str, int], idle: Collection[str]) -> Mapping[str, int]:
        """Set idle layers to the cap in one step, since a part of it is never better."""
        assert self.pruned.order is not None
        shares, norms = self.shares, self.pruned.order.norms
        # Not experts that no token reached, nor layers that lost only zeros: both may cost something on other data.
        known = {
            layer.name
            for layer in self.anatomy.layers
            if layer.name in idle and layer.name in norms and shares.error(layer, zeros[layer.name])
        }
        cap, floor = self.limits.get("max_sparsity"), self.limits.get("min_sparsity") or 0.0
        return filled(zeros, known, self.anatomy.layers, self.budgets, cap, floor)

    def _near(self, goal: Goal, begin: Mapping[str, int], step: float) -> tuple[Mapping[str, int], str]:
        """The best shares within ``step`` from ``begin``, and their name."""
        reach = max(step, _FINE)
        return between(begin, goal(reach), step / reach, self.budgets), f"up to {step:.3g} away"

    def _part(self, goal: Goal, begin: Mapping[str, int], part: float) -> tuple[Mapping[str, int], str]:
        """A part of the way from ``begin`` to the best shares at any distance, and its name."""
        return between(begin, goal(1.0), part, self.budgets), f"{part:.3g} of the way"

    def _stepped(
        self,
        here: State,
        towards: Callable[[float], tuple[Mapping[str, int], str]],
        steps: Sequence[float],
        walking: bool,
    ) -> State:
        """The state after the best of the steps, with walks after the first that lowers the loss; else ``here``.

        Args:
            towards: gives the allocation of a step, and its name.
            steps: lengths, the longest first.
        """
        best, last = here, here.zeros
        for step in steps:
            zeros, name = towards(step)
            if zeros == last:  # the best shares are nearer than either step
                continue
            last = zeros
            loss = self._measured(zeros, name, walking)
            if loss >= best.loss and best is not here:
                break
            if loss < best.loss:
                longest = min(2 * step, self._steps(here.phase)[0])
                best = replace(here.moved(zeros, loss, self._at_work), step=longest)
                if walking:  # a shorter step would cost another walk, and the next round needs this walk's order
                    break
        return best

    def _costs(self, phase: str) -> Costs:
        """Costs of the blocks and, if the phase needs them, of kinds and layers; last, the layers that cost exactly 0.

        No output depends on those layers: they are after the block whose features a vision tower returns.
        """
        pruned, shares = self.pruned, self.shares
        blocks, kinds, layers = shares.blocks, shares.kinds, {x.name: [x] for x in self.anatomy.layers}
        if self.options.by == "gradient":
            costs = by_gradient(
                pruned.model, pruned.masked, pruned.divergence, self.anatomy.layers, self.anatomy.replayable
            )
            sums = [
                {name: math.fsum(costs[one.name] for one in members) for name, members in units.items()}
                for units in (blocks, kinds)
            ]
            idle = {name for name, cost in costs.items() if cost == 0}
            return sums[0], None if phase == "block" else sums[1], costs if phase == "layer" else None, idle

        def probed(units: Mapping[str, Sequence[Any]]) -> dict[str, float]:
            return by_probes(pruned.masked, pruned.replay, pruned.divergence, units)

        of_blocks = probed(blocks)
        return (
            of_blocks,
            None if phase == "block" else probed(kinds),
            probed(layers) if phase == "layer" else None,
            {one.name for block, members in blocks.items() if of_blocks[block] == 0 for one in members},
        )

    def swapped(self, here: State, seed: int) -> State:
        """Try single moves of zeros from one layer to another, and keep those that lower the measured loss."""
        cap, floor = self.limits.get("max_sparsity"), self.limits.get("min_sparsity") or 0.0
        sizes = {layer.name: layer.numel for layer in self.anatomy.layers}
        self._at_work = "swaps"
        while here.swaps < self.options.swaps:
            self.pruned.by_dense()
            names, giver, taker = self._pair(seed, here.swaps)
            amount = max(1, round(_SWAP * min(sizes[giver], sizes[taker])))
            amount = min(amount, here.zeros[giver] - math.ceil(floor * sizes[giver]),
                         math.floor((1.0 if cap is None else cap) * sizes[taker]) - here.zeros[taker])  # fmt: skip
            here = replace(here, swaps=here.swaps + 1)
            if len(names) > 1 and giver != taker and amount > 0:
                zeros = {**here.zeros, giver: here.zeros[giver] - amount, taker: here.zeros[taker] + amount}
                loss = self._measured(zeros, str(here.swaps))
                if loss < here.loss:
                    here = here.moved(zeros, loss, self._at_work)
            self.save(here.to_json())
            self.task.advance(1, self._at_work)
        return here

    def _pair(self, seed: int, number: int) -> tuple[Sequence[str], str, str]:
        """Two layers of one budget, chosen by (seed, number), so that a resumed search gives the same result."""
        digest = hashlib.sha256(f"ecoflap swap {seed} {number}".encode()).digest()
        draw = random.Random(int.from_bytes(digest[:8], "big"))
        names = draw.choices(self.budgets, weights=[len(budget) for budget in self.budgets])[0]
        giver, taker = draw.choice(names), draw.choice(names)
        return names, giver, taker

    def _measured(self, zeros: Mapping[str, int], what: str, walking: bool = False) -> float:
        self._tell(what)
        return self.pruned.measure(zeros, walking=walking)

    def _tell(self, what: str) -> None:
        """Update the progress without a step: it shows the measurement, and handles a signal."""
        self.task.advance(0, f"{self._at_work}: {what}")
