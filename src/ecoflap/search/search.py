"""Searches the allocation with the least measured loss, starting from statistics of the dense model.

The search is our own. As in SPDY (arXiv 2201.13096) and EvoPress (arXiv 2410.14649), blocks that the criterion prunes
are measured, and levels are solved for. Costs are measured at the current allocation, with the interactions of blocks;
the shape of the curves comes from the local errors of the layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ecoflap.allocation import Allocation, SearchRecord
from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.allocation.patterns import Compare
from ecoflap.data.batches import first_samples
from ecoflap.data.objectives import Objective, on_device
from ecoflap.model.compute import FLOAT32, NATIVE, computing_in
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.model.replay import Replay
from ecoflap.model.slices import experts_in_turn
from ecoflap.model.trace import evaluating
from ecoflap.pruning.prune import PruningOptions
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel
from ecoflap.search.options import PHASES, NoJournal, SearchJournal, SearchOptions, State
from ecoflap.search.order import Order, compensated
from ecoflap.search.pruned_model import Orders, PrunedModel
from ecoflap.search.rounds import Search
from ecoflap.search.solve import budgets_of
from ecoflap.statistics.dense import SharedNorms
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.registry import check_option_kinds, check_option_names
from ecoflap.support.work import Work
from ecoflap.support.workers import ALONE, Workers

_log = logging.getLogger("ecoflap")


@dataclass(frozen=True)
class Found:
    """The final allocation of the search, and its record."""

    allocation: Allocation
    record: SearchRecord

    @property
    def recorded(self) -> Allocation:
        """The allocation with the search record inside."""
        return replace(self.allocation, search=self.record)


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
    compute: str = NATIVE,
) -> Found:
    """Improve ``allocation`` by measuring the model masked by it. The model is unchanged afterwards.

    Each round measures the cost of every part at the current allocation, scales the layers' local errors to these
    costs, solves for the shares with the least predicted loss under budget and caps, and steps towards them as far as
    the measured loss falls. So the result is never worse than the start, on these batches and with these masks; the
    criterion then prunes block by block.

    Args:
        allocation: the start.
        batches: to measure on.
        order: the order in which the criterion removes weights; or, if it depends on inputs, ``Orders``.
        loss: objective; also the metric if the outputs have no divergence.
        shares: options of the allocation: sparsity, max_sparsity, min_sparsity, budget, tower_sparsity.
        seed: of the swaps.
        journal: contains the state of an interrupted search, and receives new states; the same for all workers.
        workers: processes with the same model and batches; each runs a share of the batches.
        compute: the dtype that the model computes in: ``native``, or ``float32`` around this call.

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
        for context in (evaluating(model), cache_disabled(model), experts_in_turn(model)):
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
        masked = state.enter_context(MaskedModel(model, anatomy, compute == FLOAT32))
        replay = state.enter_context(Replay(model, anatomy.replayable))
        pruned = PrunedModel(model, anatomy, order, divergence, masked, replay)
        given = {row.name: row.zeros for row in allocation.layers}
        search = Search(pruned, limits, budgets_of(allocation, limits), phases, options, journal.save, task, given)
        here = begun or search.start()
        here = search.swapped(search.settled(here), seed)
    rows = tuple(replace(row, zeros=here.zeros[row.name]) for row in allocation.layers)
    single = options.granularity != "block" or options.swaps or allocation.granularity in ("layer", "expert")
    granularity = "layer" if single else "block"
    found = replace(allocation, layers=rows, granularity=granularity, max_sparsity=_highest(allocation, limits))
    record = SearchRecord(divergence.metric, here.history, here.rounds, given, here.costs or {})
    return Found(found, record)


def _highest(allocation: Allocation, limits: Mapping[str, Any]) -> float:
    cap = limits.get("max_sparsity")
    return 1.0 if cap is None else float(cap)


def search_options(options: Mapping[str, Any] | None) -> SearchOptions:
    """Make ``SearchOptions``.

    Raises:
        InvalidOption: there is no such option, or its value is out of range.
        UnknownName: a value that is a name is unknown.
    """
    check_option_names("allocation", "search", [field.name for field in fields(SearchOptions)], options or {})
    check_option_kinds("search", SearchOptions, options or {})
    return SearchOptions(**(options or {}))


def search_allocation(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    options: SearchOptions,
    shares: AllocationOptions,
    pruning: PruningOptions,
    work: Work,
    journal: SearchJournal | None = None,
    norms: SharedNorms | None = None,
) -> Found:
    """:func:`refine` from ``allocation``, for a registered local criterion.

    Args:
        batches: calibration batches; all are used for the statistics, the first ``options.samples`` for the search.
        shares: budgets and caps of the search.
        pruning: the criterion, and which tokens count in its statistics.
        journal: the same for all workers.
        norms: of the same batches, shared with other searches.

    Raises:
        CalibrationError: there are fewer samples than the search needs.
        NonFiniteLoss, InvalidOption: as there.
    """
    rule: Any = pruning.made()
    run, ranked, workers = on_device(work.loss), _compare(pruning.compare), work.workers
    own = rule.statistics in ("gram", "pair") and options.weights == "own"

    def made(statistics: Mapping[str, InputStatistics]) -> Order:
        if own:
            return compensated(statistics, rule, rule.damping, ranked)
        return Order.of(statistics, needs=rule.statistics, compare=ranked)

    needs = "gram" if own else "norm"
    with computing_in(model, work.compute):
        found = refine(
            model,
            anatomy,
            allocation,
            first_samples(batches, options.samples or None),
            Orders(model, anatomy, batches, run, needs, made, pruning.tokens, workers, norms or SharedNorms()),
            loss=work.loss,
            shares=shares.to_dict(),
            options=options,
            seed=work.seed,
            progress=work.progress,
            journal=journal,
            workers=workers,
            compute=work.compute,
        )
    losses = ", ".join(f"{loss:.4g}" for loss in found.record.losses)
    _log.info("allocation search, %s after every step: %s", found.record.metric, losses)
    return found


def _compare(text: str | None) -> Compare | None:
    return "row" if text == "row" else "matrix" if text == "matrix" else None
