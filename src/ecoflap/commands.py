"""What the commands besides ``prune`` do, as functions: inspect, importance, allocate, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption, OutputExists
from ecoflap.recipe import Recipe

if TYPE_CHECKING:
    from ecoflap.allocation import Allocation
    from ecoflap.importance.scores import Importance
    from ecoflap.network.parts import Anatomy
    from ecoflap.progress import Progress


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises OutputExists if ``path`` is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is there already: add --overwrite to replace it, or choose another --output")


def inspect_model(recipe: Recipe) -> tuple[Anatomy, str]:
    """The anatomy of the recipe's model and a line that says how it was found.

    With calibration data (bundled for the embedded model) one forward is watched; without, the order of blocks is that
    of their definition, and layers that never run can't be told.
    """
    from ecoflap.api import inspect
    from ecoflap.network.checkpoint import load
    from ecoflap.pipeline import calibration_batches

    checkpoint = load(
        recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    batch = None
    if recipe.model is None or recipe.calibration is not None:
        batch = calibration_batches(recipe.model_copy(update={"samples": 2, "batch_size": 2}), checkpoint)[1][0]
    anatomy = inspect(checkpoint.model, batch, include=recipe.include, exclude=recipe.exclude, towers=recipe.towers)
    name = type(checkpoint.model).__name__
    how = "as one forward calls them" if anatomy.traced else "as defined; give --calibration to watch a forward"
    return anatomy, f"{name}, {anatomy.total_parameters:,} parameters; towers {how}"


def measure_model(recipe: Recipe, progress: Progress) -> Importance:
    """Stage 1 on the recipe's model and calibration data."""
    from ecoflap.calibration.objectives import check_image_matters, on_device, resolve
    from ecoflap.errors import CalibrationError
    from ecoflap.importance.measure import measure_importance
    from ecoflap.network.anatomy import discover
    from ecoflap.network.cache import cache_disabled
    from ecoflap.network.checkpoint import load
    from ecoflap.pipeline import calibration_batches

    if recipe.model is not None and recipe.calibration is None:
        raise CalibrationError("importance needs calibration data: give --calibration FILE")
    recipe = recipe.resolved()
    checkpoint = load(
        recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    model = checkpoint.model
    _, batches = calibration_batches(recipe, checkpoint)
    objective = resolve(recipe.objective, model)
    with cache_disabled(model):
        check_image_matters(model, batches[0], objective)
        anatomy = discover(
            model,
            batches[0],
            include=recipe.include,
            exclude=recipe.exclude,
            towers=recipe.towers,
            run=on_device(objective),
        )
    return measure_importance(
        model,
        batches,
        recipe.importance,
        samples=recipe.importance_samples,
        seed=recipe.seed,
        loss=objective,
        anatomy=anatomy,
        progress=progress,
        **dict[str, Any](recipe.importance_options),
    )


def allocate_file(
    scores: Path, output: Path | None, overwrite: bool, *, tower_sparsity: Sequence[str], **options: Any
) -> tuple[Allocation, Path]:
    """Allocate from an importance.json (or the run directory that holds one) and write allocation.json."""
    from ecoflap.api import allocate
    from ecoflap.files import write_json
    from ecoflap.importance.scores import Importance

    source = scores / "importance.json" if scores.is_dir() else scores
    target = output or source.with_name("allocation.json")
    if output is None and (source.parent / "recipe.yaml").exists():
        target = Path("allocation.json")  # a run's own allocation is part of its record
    refuse_existing(target, overwrite)
    shares: dict[str, float] = {}
    for pair in tower_sparsity:
        name, equals, value = pair.partition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise InvalidOption(f"--tower-sparsity {pair!r}: write tower=sparsity, such as vision=0.4")
    allocation = allocate(Importance.load(source), tower_sparsity=shares, **options)
    write_json(target, allocation.to_json())
    return allocation, target


def evaluate_model(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Results of the recipe's tasks on its model, as in ``metrics.json``."""
    from ecoflap.network.checkpoint import load
    from ecoflap.pipeline import evaluate, quality, tasks_of

    tasks = tasks_of(recipe)
    if not tasks:
        raise InvalidOption("what to measure? give --task vqa or --task perplexity, and its data as --test FILE")
    checkpoint = load(
        recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    return {task: quality(evaluate(checkpoint, task, recipe, progress)) for task in tasks}
