"""Checks a recipe before a model is loaded: paths, options, tasks, data.

Paths come first and need no torch (over a second of imports). Options need torch. Nothing here needs the models of
transformers (three seconds more), so that a typing error is reported at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ecoflap.data.samples import SampleReader
from ecoflap.data.sources import check_source
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.importance.registry import AUTO, IMPORTANCES
from ecoflap.model.files import check_place
from ecoflap.pruning.registry import reads_data
from ecoflap.run.evaluations import Evaluation, check_evaluations, check_sources, evaluations_of
from ecoflap.run.recipe import Recipe

if TYPE_CHECKING:
    from ecoflap.run.finetune.recipe import Finetune


def is_measured(recipe: Recipe) -> bool:
    """Whether stage 1 measures scores."""
    known = recipe.importance in IMPORTANCES or recipe.importance == AUTO
    return recipe.allocation is None and recipe.pruned is None and known and recipe.importance != "uniform"


def needs_data(recipe: Recipe) -> bool:
    """Whether calibration samples decide the result."""
    return reads_data(recipe.criterion) or is_measured(recipe) or bool(recipe.search) or recipe.recover


def check_recipe(recipe: Recipe) -> None:
    """Check a resolved recipe without a model: its paths, then the options of method and evaluations.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    check_places(recipe)
    if recipe.calibration is None and recipe.model is not None and needs_data(recipe):
        raise CalibrationError(
            f"criterion '{recipe.criterion}' with importance '{recipe.importance}' needs calibration data: "
            "give --calibration FILE (or --criterion magnitude --importance uniform, which need none)"
        )
    check_source(recipe.calibration, recipe.image_folder)
    recipe.method().check_options()
    if ":" in (recipe.objective or ""):
        from ecoflap.data.objectives import check_own

        check_own(str(recipe.objective))
    if recipe.device_map or recipe.max_memory:
        from ecoflap.model.device_map import DISK, check_device_map
        from ecoflap.pruning.offloaded import check_blockwise

        check_device_map(recipe.device_map, recipe.max_memory)
        if recipe.device_map == DISK:
            measured = recipe.importance if is_measured(recipe) else None
            check_blockwise(measured, recipe.criterion, bool(recipe.search), recipe.recover)
    check_evaluations(recipe)


def check_places(recipe: Recipe) -> None:
    """Check that the model's files and the test data exist; ids of the Hub are checked when they are loaded.

    Raises:
        CheckpointError, CalibrationError: they do not.
    """
    for place in (recipe.model, recipe.pruned):
        if place is not None:
            check_place(place)
    for entry in evaluations_of(recipe):
        check_source(entry.test, entry.image_folder)


def check_data(recipe: Recipe) -> None:
    """Open calibration and test data, so that a broken file or a missing column is reported before the model is loaded.

    Raises:
        CalibrationError: it can't be read, is empty, or lacks a column.
    """
    if recipe.calibration is not None:
        SampleReader(recipe.calibration, **drawn(recipe))
    check_sources(recipe)


def check_training_data(recipe: Finetune) -> None:
    """Open training and held-out data; raises as :func:`check_data`."""
    for source in (recipe.train, recipe.validation):
        if source is not None:
            SampleReader(source, **drawn(recipe) | {"samples": 1})


def drawn(recipe: Recipe) -> dict[str, Any]:
    """The options of :func:`ecoflap.data.load_samples` for the calibration samples of a recipe."""
    return {
        "samples": recipe.samples,
        "seed": recipe.seed,
        "columns": recipe.columns,
        "prompt_template": recipe.prompt,
        "image_folder": recipe.image_folder,
    }


def check_evaluated(recipe: Recipe) -> tuple[Evaluation, ...]:
    """The checked evaluations of a recipe that is only evaluated; raises as :func:`check_recipe`."""
    if not evaluations_of(recipe):
        raise InvalidOption("what to measure? give --task vqa or --task perplexity, and its data as --test FILE")
    check_places(recipe)
    entries = check_evaluations(recipe)
    check_data(recipe)
    return entries


def check_measured(recipe: Recipe) -> Recipe:
    """The resolved and checked recipe of a measurement, which is stage 1 only; raises as :func:`check_recipe`."""
    if recipe.model is not None and recipe.calibration is None:
        raise CalibrationError("importance needs calibration data: give --calibration FILE")
    if recipe.importance.endswith(".json"):
        raise InvalidOption(f"importance {recipe.importance} is measured already: name a measure, such as zeroth-order")
    check_places(recipe)
    check_source(recipe.calibration, recipe.image_folder)
    recipe = recipe.resolved()
    recipe.method().importance.check(recipe.granularity)
    check_data(recipe)
    return recipe
