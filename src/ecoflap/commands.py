"""What the commands besides ``prune`` do, as functions: inspect, importance, allocate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption, OutputExists
from ecoflap.recipe import Recipe
from ecoflap.workers import ALONE, Workers

if TYPE_CHECKING:
    from ecoflap.allocation import Allocation
    from ecoflap.network.parts import Anatomy
    from ecoflap.progress import Progress


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises OutputExists if ``path`` is there and may not be replaced, or is a folder."""
    if path.is_dir():
        raise OutputExists(f"{path} is a folder: give the name of a file as --output, such as {path / 'result.json'}")
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is there already: add --overwrite to replace it, or choose another --output")


def find_own_modules(run: Path) -> None:
    """Let a run's objective ``module:function`` be imported from the folder where the command was given."""
    import sys

    from ecoflap.run import RECIPE, RunDirectory

    objective = RunDirectory(run).recorded().get("objective") if (run / RECIPE).is_file() else None
    if ":" in str(objective) and "" not in sys.path:
        sys.path.append("")


def inspect_model(recipe: Recipe) -> tuple[Anatomy, str]:
    """The anatomy of the recipe's model and a line that says how it was found.

    With calibration data (bundled for the embedded model) one forward is watched; without, the order of blocks is that
    of their definition, and layers that never run can't be told.
    """
    from ecoflap.calibration.objectives import resolve
    from ecoflap.large import load_checkpoint
    from ecoflap.prepare import calibration_batches, find_layers

    checkpoint = load_checkpoint(recipe)
    batches = []
    if recipe.model is None or recipe.calibration is not None:
        few = recipe.model_copy(update={"samples": 2, "batch_size": 2})
        batches = calibration_batches(few, checkpoint)[1]
    objective = resolve(recipe.objective, checkpoint.model)
    anatomy = find_layers(recipe, checkpoint.model, batches, objective)
    how = "in the order of a forward" if anatomy.traced else "in the order of definition (--calibration watches a run)"
    return anatomy, f"{type(checkpoint.model).__name__}, {anatomy.total_parameters:,} parameters; towers {how}"


def allocate_file(scores: Path, recipe: Recipe, output: Path | None, overwrite: bool) -> tuple[Allocation, Path]:
    """Allocate from an importance.json (or the run directory that holds one) and write allocation.json."""
    from ecoflap.api import allocate
    from ecoflap.files import write_json
    from ecoflap.importance.scores import Importance

    source = scores / "importance.json" if scores.is_dir() else scores
    target = output or source.with_name("allocation.json")
    if output is None and (source.parent / "recipe.yaml").exists():
        target = Path("allocation.json")  # a run's own allocation is part of its record
    refuse_existing(target, overwrite)
    allocation = allocate(Importance.load(source), **recipe.shares())
    write_json(target, allocation.to_json())
    return allocation, target


def evaluate_model(recipe: Recipe, progress: Progress, workers: Workers = ALONE) -> dict[str, Any]:
    """Results of the recipe's evaluations on its model, as in ``metrics.json``, by their names."""
    from ecoflap.evaluations import check_evaluations, evaluate
    from ecoflap.large import load_checkpoint
    from ecoflap.pipeline import quality

    entries = check_evaluations(recipe)
    if not entries:
        raise InvalidOption("what to measure? give --task vqa or --task perplexity, and its data as --test FILE")
    checkpoint = load_checkpoint(recipe, workers=workers)
    return {entry.name: quality(evaluate(checkpoint, entry, recipe, progress, workers)) for entry in entries}
