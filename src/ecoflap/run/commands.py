"""Implements the commands besides ``prune``: inspect, importance, allocate, evaluate.

``importance`` keeps its estimates in a folder beside the output file until that file is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ecoflap.errors import OutputExists
from ecoflap.evaluation.paired import Samples
from ecoflap.run.directory import RunDirectory, places_of
from ecoflap.run.names import JOURNAL, LOG, MANIFEST, RECIPE
from ecoflap.run.recipe import Recipe
from ecoflap.support.files import check_can_make, write_json
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    from ecoflap.allocation import Allocation
    from ecoflap.importance.scores import Importance
    from ecoflap.model.parts import Anatomy
    from ecoflap.run.evaluations import Evaluation
    from ecoflap.run.recipe import Recipe
    from ecoflap.run.shared import SharedRun
    from ecoflap.statistics.routing import Routing
    from ecoflap.support.progress import Progress


def refuse_existing(path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises OutputExists if ``path`` exists and may not be replaced, StorageError if a parent is a file.

    Args:
        inputs: files and folders that are read; a file that is one of them, or lies in one, is never replaced.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OutputExists(f"{path} is a device or a pipe, not a regular file: choose another --output")
    if path.is_dir():
        raise OutputExists(f"{path} is a folder: give the name of a file as --output, such as {path / 'result.json'}")
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is there already: add --overwrite to replace it, or choose another --output")
    own = Path(os.path.realpath(path))
    for source in inputs if path.exists() else ():
        if source is not None and Path(os.path.realpath(Path(source).expanduser())) in (own, *own.parents):
            raise OutputExists(f"{path} is part of the input {source}, and would be lost: choose another --output")
    check_can_make(path)


def find_own_modules(objective: str | None) -> None:
    """Make the user's objective ``module:function`` importable from the current folder."""
    import sys

    if ":" in (objective or "") and "" not in sys.path:
        sys.path.append("")


def inspect_model(recipe: Recipe) -> tuple[Anatomy, str, Routing]:
    """The anatomy of the recipe's model, a line that says how it was found, and the tokens of each expert.

    With calibration data (bundled for the embedded model) one forward is traced. Without, blocks are in the order of
    their definition, and it is unknown which layers never run. A model with mixtures runs on all calibration samples,
    to count the tokens of each expert.
    """
    from ecoflap.data.sources import check_source
    from ecoflap.run.checks import check_places

    check_places(recipe)
    check_source(recipe.calibration, recipe.image_folder)
    from ecoflap.data.objectives import on_device, resolve
    from ecoflap.run.loading import load_checkpoint
    from ecoflap.run.prepare import calibration_batches, find_layers
    from ecoflap.statistics.routing import routing

    checkpoint = load_checkpoint(recipe)
    batches = []
    if recipe.model is None or recipe.calibration is not None:
        few = recipe.model_copy(update={"samples": 2, "batch_size": 2})
        batches = calibration_batches(few, checkpoint)[1]
    objective = resolve(recipe.objective, checkpoint.model)
    anatomy = find_layers(recipe, checkpoint.model, batches, objective)
    how = "in the order of a forward" if anatomy.traced else "in the order of definition (--calibration watches a run)"
    sent: Routing = {}
    if batches and any(layer.expert for layer in anatomy.layers):
        every = calibration_batches(recipe, checkpoint)[1]
        sent = routing(checkpoint.model, anatomy, every, on_device(objective))
    note = f"{type(checkpoint.model).__name__}, {anatomy.total_parameters:,} parameters; towers {how}"
    return anatomy, note, sent


def allocate_file(scores: Path, recipe: Recipe, output: Path | None, overwrite: bool) -> tuple[Allocation, Path]:
    """Allocate from an importance.json, or a run directory with one, and write allocation.json."""
    from ecoflap.importance.allocate import allocate
    from ecoflap.importance.scores import Importance
    from ecoflap.support.files import write_json

    source = scores / "importance.json" if scores.is_dir() else scores
    target = output or source.with_name("allocation.json")
    if output is None and (source.parent / "recipe.yaml").exists():
        target = Path("allocation.json")  # a run's own allocation is part of its record
    refuse_existing(target, overwrite, [scores])
    allocation = allocate(Importance.load(source), **recipe.shares())
    write_json(target, allocation.to_json())
    return allocation, target


def evaluate_model(
    recipe: Recipe, progress: Progress, workers: Workers = ALONE, against: str | None = None
) -> dict[str, Any]:
    """Results of the recipe's evaluations on its model by name, as in ``metrics.json``.

    A result with scores of single samples also has ``samples``, see :class:`ecoflap.evaluation.paired.Samples`.

    Args:
        against: another model, a run or a file of results. Each result then has ``paired``: the differences on the same
            samples, by the name of the other model.

    Raises:
        InvalidOption: the other results are of other samples, or have no scores of samples.
        EcoflapError: a subclass says what else is wrong.
    """
    from ecoflap.run.checks import check_evaluated

    entries = check_evaluated(recipe)
    names = [entry.name for entry in entries]
    from ecoflap.run.against import Reference, differences, is_model, read_references

    another = against is not None and is_model(against)
    known = {} if against is None or another else read_references(against, names)
    results = _evaluated(recipe, entries, progress, workers)
    if against is not None and another:
        other = _evaluated(recipe.model_copy(update={"model": against}), entries, progress, workers)
        known = {
            name: {against: Reference(Samples(**found["samples"]), found["settings"])}
            for name, found in other.items()
            if found["samples"] is not None
        }
    for name, result in results.items():
        if result["samples"] is not None and name in known:
            own = Reference(Samples(**result["samples"]), result["settings"])
            result["paired"] = differences(name, own, known[name])
    return results


def _evaluated(
    recipe: Recipe, entries: Sequence[Evaluation], progress: Progress, workers: Workers
) -> dict[str, dict[str, Any]]:
    from ecoflap.run.evaluations import UNFIT, evaluate, unfit
    from ecoflap.run.loading import load_checkpoint
    from ecoflap.run.provenance import digests_of
    from ecoflap.run.quality import record
    from ecoflap.run.shared import check_same

    check_same(recipe, workers, digests_of(recipe))
    checkpoint = load_checkpoint(recipe, workers=workers, packed=True, progress=progress)
    found = {}
    for entry in entries:
        try:
            found[entry.name] = record(evaluate(checkpoint, entry, recipe, progress, workers))
        except UNFIT as error:
            raise unfit(error, entry, checkpoint) from error
    return {name: {**kept["result"], "samples": kept["samples"]} for name, kept in found.items()}


SUFFIX = ".journal"  # the folder is named as the output file, with this suffix


class Measurement(RunDirectory):
    """The folder of a running measurement: a run directory that is removed once the output file is written."""

    what: ClassVar[str] = "measurement that was interrupted"
    ours: ClassVar[tuple[str, ...]] = (JOURNAL, LOG, RECIPE, MANIFEST)


def remove(folder: Path) -> None:
    """Remove the folder of a finished measurement."""
    work = Measurement(folder)
    for name in work.ours:
        work.discard(name)
    folder.rmdir()


def measure_to(
    recipe: Recipe,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: Workers = ALONE,
    say: Callable[[str], None] | None = None,
) -> Importance:
    """Measure the scores of the recipe's model and write them to ``output``.

    After an interruption, ``resume`` continues, and the file has the same bytes.

    Args:
        overwrite: replace the file, and an interrupted measurement for it.
        resume: continue an interrupted measurement; begin one if there is none.
        workers: processes that all make this call; the first one writes.
        say: receives the name of the chosen importance if the recipe leaves it open.

    Raises:
        OutputExists: the file, or an interrupted measurement for it, exists and neither option is given.
        ResumeMismatch: options, versions, model or data differ from those of the interrupted measurement.
        EcoflapError: a subclass says what else is wrong.
    """
    from ecoflap.run.checks import check_measured
    from ecoflap.run.shared import SharedRun

    folder = output.with_name(output.name + SUFFIX)
    begun = resume and folder.exists()
    if workers.first:
        refuse_existing(output, overwrite or begun, [place for _, place in places_of(recipe)])
    recipe = check_measured(recipe)
    work = SharedRun.examine(folder, recipe, workers, overwrite=overwrite, resume=resume, kind=Measurement)
    with work.locked():
        return _measured(recipe, output, progress, work, workers, say)


def _measured(
    recipe: Recipe,
    output: Path,
    progress: Progress,
    work: SharedRun,
    workers: Workers,
    say: Callable[[str], None] | None,
) -> Importance:
    from ecoflap.data.batches import first_samples
    from ecoflap.model.fingerprint import fingerprint
    from ecoflap.run.loading import load_checkpoint
    from ecoflap.run.log import explained, logging_to
    from ecoflap.run.pipeline import importance_for
    from ecoflap.run.prepare import naming_samples, plan_on, settled
    from ecoflap.run.provenance import threads_of_start

    recipe = work.settled(recipe)
    checkpoint = load_checkpoint(recipe, workers=workers, progress=progress)
    plan = settled(plan_on(checkpoint, recipe, workers=workers))
    if plan.chosen and say is not None:
        say(plan.chosen)
    first_samples(plan.batches, recipe.importance_samples)
    work.begin(plan.recipe, fingerprint(plan.checkpoint.model), plan.inputs())
    with (
        logging_to(work.log),
        explained(work.path, work.log),
        naming_samples(plan),
        threads_of_start(work.path / JOURNAL / "machine.json", plan.checkpoint.model, workers),
    ):
        journal = work.estimates()
        try:
            importance = importance_for(plan, progress, journal, workers)
        finally:
            journal.close()
        if workers.first:
            write_json(output, importance.to_json())
            workers.gather(None)  # wait until the others have closed their files
            remove(work.path)
    if not workers.first:
        workers.gather(None)
    return importance
