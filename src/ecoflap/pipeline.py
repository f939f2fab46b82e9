"""The whole job on one page: load, calibrate, importance, allocation, pruning, save, evaluate, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecoflap import run as files
from ecoflap.allocation import Allocation
from ecoflap.api import allocate, check_same_layers, prune_to
from ecoflap.calibration.batches import make_batches
from ecoflap.calibration.models import Batch
from ecoflap.calibration.objectives import Objective, check_image_matters, check_loss, on_device, resolve
from ecoflap.calibration.sources import SampleSet, load_samples
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation import TASKS, TaskResult
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.scores import Importance
from ecoflap.network.anatomy import discover
from ecoflap.network.cache import cache_disabled
from ecoflap.network.checkpoint import Checkpoint, fingerprint, load, save
from ecoflap.network.parts import Anatomy
from ecoflap.progress import Progress, Silent
from ecoflap.recipe import Recipe
from ecoflap.report import write_report
from ecoflap.resources import Usage, measured
from ecoflap.run import BlockFiles, EstimateFile, RunDirectory
from ecoflap.summary import calibration_record, environment, sparsity_summary

_log = logging.getLogger("ecoflap")
TEXT_SUFFIXES = (".txt", ".md")


@dataclass
class _Job:
    """A run under way: what the stages share."""

    recipe: Recipe
    run: RunDirectory
    checkpoint: Checkpoint
    anatomy: Anatomy
    batches: Sequence[Batch]
    objective: Objective
    progress: Progress
    usages: list[Usage]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, and keep its figures for a run that is resumed later."""
        _log.info("stage %s", name)
        with measured(name, self.usages):
            yield
        self.run.write("journal/stages.json", [usage.to_json() for usage in self.usages])


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Do all that ``recipe`` asks for, leaving every stage's file in ``output``.

    Interrupted at any moment, it goes on with ``resume=True`` and ends with the same files to the bit (times aside).

    Returns:
        The run directory.

    Raises:
        EcoflapError: a subclass says what is wrong and how to mend it.
    """
    recipe = recipe.resolved()
    tasks = tasks_of(recipe)
    with RunDirectory.examine(output, recipe, overwrite=overwrite, resume=resume) as run:
        if run.complete:
            return run.path
        checkpoint = load(
            recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
        )
        sample_set, batches = _calibrate(recipe, checkpoint)
        objective = resolve(recipe.objective, checkpoint.model)
        anatomy = _anatomy(recipe, checkpoint, batches, objective)
        run.begin(recipe, fingerprint(checkpoint.model))
        with _logging_to(run.path / files.LOG):
            usages = [Usage(**row) for row in run.read("journal/stages.json")] if run.has("journal/stages.json") else []
            job = _Job(recipe, run, checkpoint, anatomy, batches, objective, progress or Silent(), usages)
            dense = _evaluated(job, tasks, "dense")
            allocation, unreached = _prune(job, _allocation(job))
            pruned = _evaluated(job, tasks, "pruned")
            run.write(files.METRICS, {
                "format": 1,
                "dense": dense,
                "pruned": pruned,
                "sparsity": sparsity_summary(anatomy, allocation),
                "dense_weights": [{"name": u.name, "reason": u.reason, "weights": u.numel} for u in anatomy.unprunable],
                "unreached": list(unreached),
                "stages": [usage.to_json() for usage in job.usages],
                "calibration": calibration_record(sample_set),
                "environment": environment(checkpoint),
            })  # fmt: skip
            write_report(run.path)
        run.finish()
        return run.path


def tasks_of(recipe: Recipe) -> tuple[str, ...]:
    """What is evaluated: the recipe's tasks, else VQA on the embedded model, else what the test data fits."""
    if recipe.task is not None:
        return recipe.task
    if recipe.test is not None:
        return ("perplexity",) if Path(recipe.test).suffix in TEXT_SUFFIXES else ("vqa",)
    return ("vqa",) if recipe.model is None else ()


def needs_calibration(recipe: Recipe) -> bool:
    """Magnitude at a given or uniform allocation reads no data."""
    return recipe.criterion != "magnitude" or (recipe.importance != "uniform" and recipe.allocation is None)


def calibration_batches(recipe: Recipe, checkpoint: Checkpoint) -> tuple[SampleSet, list[Batch]]:
    """The fixed calibration samples of a recipe, and their batches on the CPU."""
    sample_set = load_samples(
        recipe.calibration,
        samples=recipe.samples,
        seed=recipe.seed,
        columns=recipe.columns,
        prompt_template=recipe.prompt,
    )
    batches = make_batches(
        sample_set,
        checkpoint.model,
        checkpoint.processor,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    )
    return sample_set, batches


def _calibrate(recipe: Recipe, checkpoint: Checkpoint) -> tuple[SampleSet | None, list[Batch]]:
    if recipe.calibration is None and recipe.model is not None:
        if needs_calibration(recipe):
            raise CalibrationError(
                f"criterion '{recipe.criterion}' with importance '{recipe.importance}' needs calibration data: "
                "give --calibration FILE (or --criterion magnitude --importance uniform, which need none)"
            )
        return None, []
    return calibration_batches(recipe, checkpoint)


def _anatomy(recipe: Recipe, checkpoint: Checkpoint, batches: Sequence[Batch], objective: Objective) -> Anatomy:
    model = checkpoint.model
    with cache_disabled(model):
        if batches:
            check_loss(model, batches[0], objective)
            check_image_matters(model, batches[0], objective)
        return discover(
            model,
            batches[0] if batches else None,
            include=recipe.include,
            exclude=recipe.exclude,
            towers=recipe.towers,
            run=on_device(objective),
        )


def _allocation(job: _Job) -> Allocation:
    recipe, run = job.recipe, job.run
    if not run.has(files.ALLOCATION):
        if recipe.allocation is not None:
            allocation = read_allocation(recipe.allocation)
        else:
            importance = _importance(job)
            allocation = allocate(
                importance,
                recipe.sparsity,
                max_sparsity=recipe.max_sparsity,
                min_sparsity=recipe.min_sparsity,
                granularity=recipe.granularity,
                aggregate=recipe.aggregate,
                budget=recipe.budget,
                tower_sparsity=recipe.tower_sparsity,
                pattern=recipe.pattern,
            )
        check_same_layers(job.anatomy, allocation)
        run.write(files.ALLOCATION, allocation.to_json())
    allocation = read_allocation(run.path / files.ALLOCATION)
    check_same_layers(job.anatomy, allocation)
    return allocation


def read_allocation(path: str | Path) -> Allocation:
    """Read an ``allocation.json``. Raises InvalidOption where it can't be read or does not add up."""
    try:
        return Allocation.from_json(json.loads(Path(path).read_text("utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidOption(f"can't read the allocation {path}: {error}") from error


def _importance(job: _Job) -> Importance:
    recipe, run = job.recipe, job.run
    if run.has(files.IMPORTANCE):
        return Importance.load(run.path / files.IMPORTANCE)
    if recipe.importance.endswith(".json"):
        importance = Importance.load(recipe.importance)
    elif recipe.importance == "uniform":
        importance = Importance.uniform(job.anatomy.layers)
    else:
        journal = EstimateFile(run.path / files.JOURNAL / "importance.jsonl")
        try:
            with job.stage("importance"):
                importance = measure_importance(
                    job.checkpoint.model,
                    job.batches,
                    recipe.importance,
                    samples=recipe.importance_samples,
                    seed=recipe.seed,
                    loss=job.objective,
                    anatomy=job.anatomy,
                    progress=job.progress,
                    journal=journal,
                    **dict[str, Any](recipe.importance_options),
                )
        finally:
            journal.close()
    run.write(files.IMPORTANCE, importance.to_json())
    return importance


def _prune(job: _Job, allocation: Allocation) -> tuple[Allocation, tuple[str, ...]]:
    recipe, run = job.recipe, job.run
    with job.stage("pruning"):
        allocation, unreached = prune_to(
            job.checkpoint.model,
            job.anatomy,
            allocation,
            job.batches,
            criterion=recipe.criterion,
            pattern=recipe.pattern,
            compare=recipe.compare,
            loss=job.objective,
            offload_activations=recipe.offload_activations,
            progress=job.progress,
            journal=BlockFiles(run.path / files.JOURNAL / "blocks"),
        )
    for name in unreached:
        _log.warning("%s was reached by no calibration token: pruned by magnitude", name)
    run.write(files.ALLOCATION, allocation.to_json())
    if not run.has(files.MODEL):
        with job.stage("saving"):
            save(job.checkpoint, run.path / files.MODEL)
    return allocation, unreached


def _evaluated(job: _Job, tasks: Sequence[str], when: str) -> dict[str, Any]:
    """Results of all tasks, from the journal where an interrupted run has them."""
    name = f"journal/{when}.json"
    if not tasks:
        return {}
    if not job.run.has(name):
        with job.stage(f"evaluation, {when}"):
            results = {task: quality(evaluate(job.checkpoint, task, job.recipe, job.progress)) for task in tasks}
        job.run.write(name, results)
    found: dict[str, Any] = job.run.read(name)
    return found


def evaluate(checkpoint: Checkpoint, task: str, recipe: Recipe, progress: Progress) -> TaskResult:
    """One task with the recipe's test data and settings."""
    with torch.no_grad():
        return TASKS.get(task)(
            checkpoint.model,
            checkpoint.processor,
            data=recipe.test,
            samples=recipe.test_samples,
            batch_size=recipe.batch_size,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            progress=progress,
        )


def quality(result: TaskResult) -> dict[str, Any]:
    """A task's result as in ``metrics.json``: without the single predictions."""
    return {
        "metric": result.metric,
        "value": result.value,
        "stderr": result.stderr,
        "n": result.n,
        "by_group": result.by_group,
        "settings": result.settings,
    }


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """The package's messages go to the run's log file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.setLevel(level)
        _log.removeHandler(handler)
        handler.close()
