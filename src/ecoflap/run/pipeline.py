"""Runs a recipe: evaluate, measure importance, allocate, prune, save, evaluate, report.

Each cell of a comparison calls the same stages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecoflap.allocation import Allocation
from ecoflap.allocation.parts import read_allocation
from ecoflap.api import allocation_of, importance_of
from ecoflap.importance.measure import EstimateJournal
from ecoflap.importance.scores import Importance
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.save import save, stored_bytes
from ecoflap.model.slices import stored_matrix
from ecoflap.pruning.journal import BlockJournal
from ecoflap.pruning.prune import prune_layers
from ecoflap.pruning.walk import WalkResult
from ecoflap.run import names as files
from ecoflap.run.baseline import pruned_uniformly
from ecoflap.run.evaluations import Evaluation, evaluate, evaluations_of
from ecoflap.run.given_zeros import recovered, with_given_zeros
from ecoflap.run.log import explained, logging_to
from ecoflap.run.pages import PAGES
from ecoflap.run.predictions import add_pictures, compared
from ecoflap.run.prepare import Prepared, by_options, naming_samples, prepare
from ecoflap.run.provenance import (
    Usage,
    add_usage,
    calibration_record,
    environment,
    experts_record,
    measured,
    sparsity_summary,
    threads_of_start,
    warn_of_layers,
)
from ecoflap.run.quality import Kept, paired_results, record
from ecoflap.run.recipe import Recipe
from ecoflap.run.shared import SharedRun
from ecoflap.search.options import SearchJournal
from ecoflap.support.files import check_room
from ecoflap.support.formats import duration
from ecoflap.support.progress import LOADING, Labelled, Progress, Silent
from ecoflap.support.reading import checked
from ecoflap.support.workers import ALONE, Workers

_log = logging.getLogger("ecoflap")


def importance_for(
    plan: Prepared, progress: Progress, journal: EstimateJournal | None = None, workers: Workers = ALONE
) -> Importance:
    """Stage 1 of a plan; known estimates are read from ``journal``, new ones are added."""
    return importance_of(
        *plan.parts, plan.recipe.method(), plan.work(progress, workers), plan.given, journal, plan.norms
    )


def allocation_for(
    plan: Prepared,
    importance: Importance,
    progress: Progress,
    journal: SearchJournal | None = None,
    workers: Workers = ALONE,
) -> Allocation:
    """The allocation from the scores, improved by a search if the recipe asks for it."""
    return allocation_of(
        *plan.parts, importance, plan.recipe.method(), plan.work(progress, workers), journal, plan.norms
    )


def pruned_to(
    plan: Prepared,
    allocation: Allocation,
    progress: Progress,
    journal: BlockJournal | None = None,
    workers: Workers = ALONE,
) -> WalkResult:
    """Stage 2, in place; blocks that are pruned already are read from ``journal``, new ones are added."""
    model, anatomy, batches = plan.parts
    if plan.pruned is not None:
        return recovered(plan, progress, journal, workers)
    method, work = plan.recipe.method(), plan.work(progress, workers)
    return prune_layers(model, anatomy, allocation, batches, method.pruning, method.allocation, work, journal)


STAGES = f"{files.JOURNAL}/stages.json"
MACHINE = f"{files.JOURNAL}/machine.json"


@dataclass
class _Job:
    """A running run: the objects that the stages share."""

    plan: Prepared
    run: SharedRun
    progress: Progress
    usages: list[Usage]
    workers: Workers

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure time and memory of a stage, and store them for a resumed run."""
        _log.info("%s: begins", name)
        took: list[Usage] = []
        with measured(name, took):
            yield
        _log.info("%s: done in %s", name, duration(took[0].seconds))
        add_usage(self.usages, took[0])
        self.run.write_sealed(STAGES, [usage.to_json() for usage in self.usages])


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    workers: Workers = ALONE,
    begun: Callable[[], None] | None = None,
    data_checked: bool = False,
) -> Path:
    """Carry out ``recipe`` and write the file of every stage into ``output``; return this folder.

    After an interruption, ``resume=True`` continues, and the files are the same to the bit except for times. Several
    workers give the same files as one; the first one writes them.

    Args:
        say: receives one line for each choice that the recipe left open: columns of the data, objective.
        workers: processes that all make this call.
        begun: called after the folder is locked and the recipe is written.
        data_checked: the data was opened by :func:`ecoflap.run.checks.check_data` already.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it. The recipe is checked before ``output`` is
            touched.
        Stopped: by a signal, after the run had begun.
        RunFailed: any other failure; the run's log has the traceback.
    """
    asked, recipe = recipe, recipe.resolved()
    run = SharedRun.examine(output, recipe, workers, overwrite=overwrite, resume=resume)
    with run.locked():
        if run.complete:
            if run.first:
                run.finish()
            return run.path
        loading: list[Usage] = []
        with measured(LOADING, loading):
            plan = with_given_zeros(prepare(run.settled(recipe), workers, progress, data_checked))
        for line in (*plan.choices(), *by_options(asked, recipe), *plan.shortage()):
            if say is not None:
                say(line)
        run.begin(plan.recipe, fingerprint(plan.checkpoint.model), plan.inputs())
        if begun is not None:
            begun()
        with (
            logging_to(run.log),
            explained(run.path, run.log),
            naming_samples(plan),
            threads_of_start(run.path / MACHINE, plan.checkpoint.model, workers),
        ):
            kept: list[Usage] = checked(run.read_sealed(STAGES) or [], list[Usage], STAGES)
            usages = kept if any(usage.name == LOADING for usage in kept) else loading + kept
            _stages(_Job(plan, run, progress or Silent(), usages, workers))
        if not run.first:
            workers.gather(None)
        return run.path


def _stages(job: _Job) -> None:
    run, plan = job.run, job.plan
    _log_start(job)
    entries = evaluations_of(job.recipe)
    dense = _evaluated(job, entries, "dense")
    allocation = _allocation(job)
    baseline = _baseline(job, entries) if job.recipe.baseline else {}
    walked = _prune(job, allocation)
    pruned = _evaluated(job, entries, "pruned")
    if not run.first:
        return
    _write_predictions(job, entries, dense, pruned)
    run.discard(files.REPORT)  # of an older state: metrics and a page mark a complete run
    run.write(files.METRICS, {
        "format": 1,
        "dense": {name: kept["result"] for name, kept in dense.items()},
        "pruned": {name: kept["result"] for name, kept in pruned.items()},
        **({"baseline": {name: kept["result"] for name, kept in baseline.items()}} if baseline else {}),
        "paired": paired_results(pruned, {"dense": dense, "baseline": baseline}),
        "sparsity": sparsity_summary(plan.anatomy, walked.allocation),
        "dense_weights": [{"name": u.name, "reason": u.reason, "weights": u.numel} for u in plan.anatomy.unprunable],
        "unreached": list(walked.unreached),
        **experts_record(plan.anatomy, walked),
        "stages": [usage.to_json() for usage in job.usages],
        "calibration": calibration_record(plan.samples, plan.objective_name, plan.window_length),
        "environment": environment(plan.checkpoint),
    })  # fmt: skip
    with run.writing(f"{files.MODEL}/"):
        PAGES.get("card")(run.path)  # into the model's folder; it reads the metrics
    PAGES.get("report")(run.path)
    job.workers.gather(None)  # wait until the others have closed their files
    run.finish()
    _log.info("complete: %s", run.path)


def _log_start(job: _Job) -> None:
    anatomy, recipe = job.plan.anatomy, job.recipe
    _log.info("run %s in %s", "goes on" if job.run.resumed else "begins", job.run.path.absolute())
    if job.workers.count > 1:
        _log.info("worker %d of %d", job.workers.rank, job.workers.count)
    _log.info("recipe: %s", recipe.model_dump(mode="json", exclude_defaults=True))
    _log.info("environment: %s", environment(job.plan.checkpoint))
    for line in (*job.plan.choices(), *job.plan.shortage()):
        _log.info("%s", line)
    for line in job.plan.checkpoint.warnings:
        _log.info("the checkpoint: %s", line)
    for tower in anatomy.towers:
        _log.info("tower %s (%s): %d blocks, %d weights", tower.name, tower.modality, len(tower.blocks), tower.numel)


def _allocation(job: _Job) -> Allocation:
    run, plan = job.run, job.plan
    importance = None if plan.allocation is not None else _importance(job)
    if not run.has_result(files.ALLOCATION):
        if importance is None:
            allocation = plan.allocation
        elif job.recipe.search:
            with job.stage("allocation search"):
                allocation = allocation_for(plan, importance, job.progress, run.search(), job.workers)
        else:
            allocation = allocation_for(plan, importance, job.progress)
        assert allocation is not None
        run.write_result(files.ALLOCATION, allocation.to_json())
    return Allocation.from_json(job.workers.from_first(lambda: read_allocation(run.path / files.ALLOCATION).to_json()))


def _importance(job: _Job) -> Importance:
    run, plan = job.run, job.plan
    if run.has_result(files.IMPORTANCE):
        return Importance.from_json(
            job.workers.from_first(lambda: Importance.load(run.path / files.IMPORTANCE).to_json())
        )
    if plan.importance is not None or job.recipe.importance == "uniform":
        importance = importance_for(plan, job.progress)
    else:
        journal = run.estimates()
        try:
            with job.stage("importance"):
                importance = importance_for(plan, job.progress, journal, job.workers)
        finally:
            journal.close()
    run.write_result(files.IMPORTANCE, importance.to_json())
    return importance


def _prune(job: _Job, allocation: Allocation) -> WalkResult:
    run, plan = job.run, job.plan
    blocks = run.blocks()
    if run.first and not (run.path / files.MODEL).exists():
        model = plan.checkpoint.model
        layers = sum(stored_matrix(model, layer.name).nbytes for layer in plan.anatomy.layers)
        walks = 2 if job.recipe.recover and plan.pruned is None else 1
        check_room(
            run.path, walks * layers - blocks.bytes() + stored_bytes(model), "the pruned model, and its journal first,"
        )
    with job.stage("pruning"):
        pruned = pruned_to(plan, allocation, job.progress, blocks, job.workers)
    warn_of_layers(plan.anatomy, pruned, recovered=plan.pruned is not None)
    run.write_result(files.ALLOCATION, pruned.allocation.to_json())
    if run.first:
        with job.stage("saving"):
            if not (run.path / files.MODEL).exists():
                with job.progress.stage("saving", total=1) as task, run.writing(f"{files.MODEL}/"):
                    save(plan.checkpoint, run.path / files.MODEL)
                    task.advance()
    return pruned


def _baseline(job: _Job, entries: Sequence[Evaluation]) -> Kept:
    """Results of the model with one sparsity for all layers; its dense weights are restored."""
    known = job.run.read_sealed(f"{files.JOURNAL}/baseline.json", Kept) or {}
    if all(entry.name in known for entry in entries):
        return _evaluated(job, entries, "baseline")
    with ExitStack() as pruned:
        with job.stage("pruning, baseline"):
            pruned.enter_context(pruned_uniformly(job.plan, job.progress, job.workers))
        return _evaluated(job, entries, "baseline")


def _evaluated(job: _Job, entries: Sequence[Evaluation], when: str) -> Kept:
    """Results of all evaluations by name; finished ones of an interrupted run come from its journal."""
    if not entries:
        return {}
    name = f"{files.JOURNAL}/{when}.json"
    kept: dict[str, Any] = job.run.read_sealed(name, Kept) or {}
    progress = Labelled(job.progress, when)
    with job.stage(f"evaluation, {when}"):  # also if all come from the journal: their usage may not be stored yet
        for entry in entries:
            if entry.name not in kept:
                found = evaluate(job.plan.checkpoint, entry, job.recipe, progress, job.workers)
                _log.info("%s, %s: %s %s", entry.name, when, found.metric, found.value)
                kept[entry.name] = record(found)
                job.run.write_sealed(name, kept)
    return kept


def _write_predictions(job: _Job, entries: Sequence[Evaluation], dense: Kept, pruned: Kept) -> None:
    """Write ``predictions.json`` and its images, for tasks with a score for each answer."""
    answers = ((name, kept["answers"], pruned[name]["answers"]) for name, kept in dense.items())
    tasks = {name: compared(before, after) for name, before, after in answers if before and after}
    if tasks:
        with job.run.writing(f"{files.PICTURES}/"):
            add_pictures(tasks, entries, job.recipe.seed, job.run.path)
        job.run.write(files.PREDICTIONS, {"format": 1, "tasks": tasks})
