"""Stage 1 alone, into a file: what it has found lies in a folder beside the file until that is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.files import write_json
from ecoflap.run import JOURNAL, LOG, RECIPE, RunDirectory
from ecoflap.workers import ALONE, Workers

if TYPE_CHECKING:
    from ecoflap.importance.scores import Importance
    from ecoflap.progress import Progress
    from ecoflap.recipe import Recipe
    from ecoflap.shared_run import SharedRun

SUFFIX = ".journal"  # of the folder's name, after the file's


class Measurement(RunDirectory):
    """The folder of a measurement under way, by the rules of a run directory; it goes when the file is there."""

    what: ClassVar[str] = "measurement that was interrupted"
    ours: ClassVar[tuple[str, ...]] = (JOURNAL, LOG, RECIPE)


def remove(folder: Path) -> None:
    """Of a measurement, of which all is in the file."""
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
) -> Importance:
    """Measure the scores of the recipe's model and write them to ``output``.

    Interrupted at any moment, it goes on with ``resume`` and ends with the same bytes.

    Args:
        overwrite: replace the file, and an interrupted measurement for it.
        resume: go on with an interrupted measurement; begin one if there is none.
        workers: those who call this alike; the first of them writes.

    Raises:
        OutputExists: the file, or an interrupted measurement for it, is there and neither option is given.
        ResumeMismatch: options, versions, model or data are not those that the measurement began with.
        EcoflapError: a subclass says what else is wrong.
    """
    from ecoflap.commands import refuse_existing
    from ecoflap.shared_run import SharedRun

    folder = output.with_name(output.name + SUFFIX)
    begun = resume and folder.exists()
    if workers.first:
        refuse_existing(output, overwrite or begun)
    _check(recipe)
    recipe = recipe.resolved()
    work = SharedRun.examine(folder, recipe, workers, overwrite=overwrite, resume=resume, kind=Measurement)
    with work.locked():
        return _measured(recipe, output, progress, work, workers)


def _check(recipe: Recipe) -> None:
    if recipe.model is not None and recipe.calibration is None:
        raise CalibrationError("importance needs calibration data: give --calibration FILE")
    if recipe.importance.endswith(".json"):
        raise InvalidOption(f"importance {recipe.importance} is measured already: name a measure, such as zeroth-order")


def _measured(recipe: Recipe, output: Path, progress: Progress, work: SharedRun, workers: Workers) -> Importance:
    from ecoflap.importance.measure import first_samples
    from ecoflap.large import load_checkpoint
    from ecoflap.machine import as_it_began
    from ecoflap.network.checkpoint import fingerprint
    from ecoflap.prepare import check_importance_options, naming_samples, plan_on
    from ecoflap.runlog import explained, logging_to
    from ecoflap.stages import importance_for

    check_importance_options(recipe)
    plan = plan_on(load_checkpoint(recipe, workers=workers), recipe)
    first_samples(plan.batches, recipe.importance_samples)
    work.begin(recipe, fingerprint(plan.checkpoint.model), plan.inputs())
    with (
        logging_to(work.log),
        explained(work.path, work.log),
        naming_samples(plan),
        as_it_began(work.path / JOURNAL / "machine.json", plan.checkpoint.model, workers),
    ):
        journal = work.estimates()
        try:
            importance = importance_for(plan, progress, journal, workers)
        finally:
            journal.close()
        if workers.first:
            write_json(output, importance.to_json())
            workers.gather(None)  # the others have closed their files there
            remove(work.path)
    if not workers.first:
        workers.gather(None)
    return importance
