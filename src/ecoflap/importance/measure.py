"""Runs an importance measure; precision, eval mode, journal and averages are the same for all measures."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from ecoflap.data.batches import as_batches, batch_size_of, first_samples, warn_if_fewer
from ecoflap.data.computing import first_run
from ecoflap.data.objectives import Objective, default_objective, on_device
from ecoflap.importance.auto import Choice, choose
from ecoflap.importance.base import ImportanceMeasure, Key, ProbeContext
from ecoflap.importance.forecast import Forecast
from ecoflap.importance.offloaded import check_offloaded
from ecoflap.importance.registry import AUTO, GRADIENT_NORM, IMPORTANCES, ZEROTH_ORDER, named
from ecoflap.importance.scores import Estimate, Importance, check_granularity, summarise
from ecoflap.importance.stopping import check_budget, stopping_of, turns
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled, gradients_set_aside
from ecoflap.model.precision import computing_in_fp32, half_blocks
from ecoflap.model.slices import experts_in_turn
from ecoflap.model.trace import evaluating
from ecoflap.statistics.dense import SharedNorms
from ecoflap.support.progress import Progress, Silent, Task, early, kept
from ecoflap.support.registry import check_options
from ecoflap.support.work import Work
from ecoflap.support.workers import ALONE, Workers, part

_log = logging.getLogger("ecoflap")


class EstimateJournal(Protocol):
    """Stores estimates one by one, so that an interrupted run can be resumed."""

    def estimates(self) -> Iterable[Estimate]: ...

    def append(self, estimate: Estimate) -> None: ...


class _MemoryJournal:
    def __init__(self) -> None:
        self._kept: list[Estimate] = []

    def estimates(self) -> Iterable[Estimate]:
        return tuple(self._kept)

    def append(self, estimate: Estimate) -> None:
        self._kept.append(estimate)


def make_measure(name: str, options: dict[str, Any]) -> ImportanceMeasure:
    """The importance registered as ``name`` with these options.

    Raises:
        UnknownName: no such importance.
        InvalidOption: it has no such option, or the value is out of range.
    """
    factory: Any = IMPORTANCES.get(name)
    check_options("importance", name, factory, options)
    measure: ImportanceMeasure = factory(**options)
    return measure


def _is_native(measure: ImportanceMeasure) -> bool:
    """Whether the measure uses the checkpoint's own dtype (its option ``precision``) instead of fp32."""
    return measure.precision == "native"


def _keys(pieces: Iterable[Sequence[Key]]) -> frozenset[Key]:
    return frozenset(key for piece in pieces for key in piece)


def own_share(pieces: Iterable[Sequence[Key]], known: Mapping[Key, float], workers: Workers) -> frozenset[Key]:
    """The estimates that this worker measures: a contiguous part of the unknown pieces.

    It is contiguous so that few workers compute what the probes of a batch have in common.
    """
    todo = [piece for piece in pieces if any(key not in known for key in piece)]
    mine = (todo[number] for number in part(len(todo), workers.count, workers.rank))
    return frozenset(key for piece in mine for key in piece if key not in known)


def _own_work(
    context: ProbeContext,
    pieces: Sequence[Sequence[Key]] | None,
    turn: Sequence[Sequence[Key]],
    known: dict[Key, float],
) -> ProbeContext:
    """The context for this worker's part of a turn: its share of the unknown estimates; without pieces, all of them."""
    others = frozenset() if pieces is None else _keys(pieces) - own_share(turn, known, context.workers)
    return replace(context, done=others | frozenset(known))


def _measured(
    measure: ImportanceMeasure, context: ProbeContext, journal: EstimateJournal, task: Task, pieces: Any
) -> list[Any]:
    """New estimates of all workers; this one's are in its journal, or those of all if all measure the same."""
    fresh, shared, ahead = [], pieces is not None, 0

    def seen(layer: str) -> None:  # progress within a batch that takes minutes
        nonlocal ahead
        ahead += 1
        early(task, 1, layer)

    for estimate in measure.estimates(replace(context, seen=seen)):
        if shared or context.workers.first:
            journal.append(estimate)
        fresh.append((estimate.layer, estimate.batch, estimate.draw, estimate.value))
        if not ahead:
            task.advance(1, estimate.layer)
        elif ahead := ahead - 1:
            continue
        else:
            kept(task)
    # What all have measured alike is taken from one of them, so that all go on from the same numbers.
    told = context.workers.gather(fresh) if shared else [context.workers.broadcast(fresh)]
    return [row for of_worker in told for row in of_worker]


@dataclass(frozen=True)
class ImportanceOptions:
    """Options of stage 1.

    Attributes:
        name: a registered importance; None if scores or an allocation are given.
        options: the importance's own, such as ``epsilon`` or ``variant``.
        samples: use the first whole batches with at least this number of samples; None takes all.
        error: sample a layer only until its standard error is this share of its score.
    """

    name: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None
    error: float | None = None

    @property
    def measured(self) -> bool:
        """Whether scores must be measured."""
        return self.name not in (None, "uniform")

    def check(self, granularity: str) -> None:
        """Raises InvalidOption or UnknownName for an unknown option, or one that contradicts another."""
        if self.name is not None and self.measured:
            name = GRADIENT_NORM if self.name == AUTO else self.name
            made = make_measure(name, dict(self.options))
            check_granularity(vars(made), granularity)
            stopping_of(name, made, self.error)

    def chosen(
        self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], loss: Objective
    ) -> tuple[ImportanceOptions, Choice | None]:
        """The same with the importance that ``auto`` chooses for this model, and the choice (None without ``auto``)."""
        if self.name != AUTO:
            return self, None
        choice = choose(model, anatomy, batches[0], loss)
        check_offloaded(model, choice.name)
        return replace(self, name=choice.name), choice

    def settled(self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], loss: Objective) -> ImportanceOptions:
        """The options of :meth:`chosen`; logs the choice, as a warning if it is the slow one."""
        found, choice = self.chosen(model, anatomy, batches, loss)
        if choice is not None:
            _log.info("%s", choice)
            if choice.name == ZEROTH_ORDER:
                warnings.warn(str(choice), stacklevel=3)
        return found


def measure_importance(
    model: nn.Module,
    batches: Iterable[Any],
    importance: str = AUTO,
    *,
    samples: int | None = None,
    seed: int = 0,
    loss: Objective | None = None,
    anatomy: Anatomy | None = None,
    progress: Progress | None = None,
    journal: EstimateJournal | None = None,
    error: float | None = None,
    workers: Workers = ALONE,
    norms: SharedNorms | None = None,
    **options: Any,
) -> Importance:
    """Stage 1: a score for each prunable layer. The model is bit-identical afterwards, also after an exception.

    Several workers measure a share of the estimates each and exchange them; all get the same scores.

    Args:
        model: any module whose forward returns a loss (or give ``loss``).
        batches: fixed calibration batches (a list, a ``DataLoader``, a generator), mappings of keyword arguments for
            ``model``, on any device.
        importance: registered name, such as ``zeroth-order``; ``auto`` is ``gradient-norm`` where the model can be
            differentiated, else ``zeroth-order``.
        samples: use the first whole batches with at least this number of samples; None takes all.
        seed: of the noise.
        loss: ``loss(model, batch)`` giving a scalar tensor; by default the model's own.
        anatomy: the prunable layers; by default discovered with the first batch.
        progress: where to report.
        journal: contains known estimates (the same for all workers), and receives this worker's new ones.
        error: sample a layer only until its standard error is this share of its score, see
            :class:`~ecoflap.importance.stopping.Stopping`, up to batches × draws. None takes all.
        workers: processes with the same ``model`` and ``batches``.
        norms: of the dense model's inputs, shared with other measures on the same batches.
        options: of the importance: ``epsilon``, ``draws``, ``replay`` (zeroth order), ``variant`` (first order).

    Raises:
        UnknownName, InvalidOption: as :func:`make_measure`; or ``error`` is out of range, or not for this importance.
        CalibrationError: there are no or too few samples.
        NonFiniteLoss: names the batch and the layer.
    """
    model, batches = getattr(model, "_orig_mod", model), as_batches(batches, loss)
    objective = loss or default_objective(model)
    importance = named(importance, options)
    chosen = ImportanceOptions(importance, options, samples, error)
    chosen.check("block")
    check_offloaded(model, importance)
    warn_if_fewer(batches, samples)
    if anatomy is None:
        with cache_disabled(model):
            anatomy = discover(model, batches[0], run=first_run(objective))
    work = Work(objective, seed, progress or Silent(), workers)
    chosen = chosen.settled(model, anatomy, batches, objective)
    return measure(model, anatomy, batches, chosen, work, journal, norms)


def measure(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    options: ImportanceOptions,
    work: Work,
    journal: EstimateJournal | None = None,
    norms: SharedNorms | None = None,
) -> Importance:
    """Stage 1 as in :func:`measure_importance`, for a model whose layers are known."""
    assert options.name is not None
    importance, workers = options.name, work.workers
    measure = make_measure(importance, dict(options.options))
    check_offloaded(model, importance)
    rule = stopping_of(importance, measure, options.error)
    batches = first_samples(batches, options.samples)
    objective = on_device(work.loss)
    journal = journal or _MemoryJournal()
    with ExitStack() as state:
        # Gradients of the user have the parameters' dtype, so they are removed before it changes, and restored after.
        for context_manager in (
            evaluating(model),
            cache_disabled(model),
            gradients_set_aside(model),
            experts_in_turn(model),
        ):
            state.enter_context(context_manager)
        upcast: tuple[str, ...] = ()
        if not _is_native(measure):
            upcast = half_blocks(model, measure.upcast(anatomy))
            state.enter_context(computing_in_fp32(model, upcast))
        known = {(e.layer, e.batch, e.draw): e.value for e in journal.estimates()}
        context = ProbeContext(
            model, anatomy, batches, objective, work.seed, frozenset(known), workers=workers, upcast=frozenset(upcast),
            norms=norms or SharedNorms(),
        )  # fmt: skip
        pieces = None if (found := measure.pieces(context)) is None else list(found)
        whole = _own_work(context, pieces, pieces or (), known)
        total = measure.steps(context) if pieces is None else len(known) + len(_keys(pieces) - whole.done)
        if rule is not None:
            check_budget(rule, pieces or (), len(batches))
            total = len(known) + len(_keys(pieces or ()) - known.keys())
        with work.progress.stage("importance", total, len(known)) as stage:
            together = len(pieces[0]) if pieces else 1
            todo = total - len(known)
            task = Forecast(stage, importance, todo, together, measure.lead) if workers.first else stage
            for turn, passed in [(pieces, 0)] if rule is None or pieces is None else turns(pieces, known, rule):
                fresh = _measured(measure, _own_work(context, pieces, turn or (), known), journal, task, pieces)
                known |= {(layer, batch, draw): value for layer, batch, draw, value in fresh}
                if passed:
                    task.advance(passed)
    values: dict[str, list[float]] = defaultdict(list)
    for (layer, _, _), value in known.items():
        values[layer].append(value)
    return Importance(
        method=importance,
        settings={
            "rule": measure.rule,
            **({} if measure.scope is None else {"scope": measure.scope}),
            **asdict(measure),  # type: ignore[call-overload]
            **context.remarks,
            **({} if rule is None else {"error": rule.error}),
            "seed": work.seed,
            "batches": len(batches),
            "samples": sum(batch_size_of(batch) for batch in batches),
            "model_parameters": anatomy.total_parameters,
        },
        layers=anatomy.layers,
        scores={layer.name: summarise(values[layer.name], measure.noisy) for layer in anatomy.layers},
        curves=measure.curves(anatomy, known),
    )
