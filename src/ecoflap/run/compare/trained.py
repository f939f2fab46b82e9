"""Makes the cells of methods that train the model: runs the training in the journal, then loads its model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecoflap.errors import InvalidOption
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.run.compare.recipe import Grid, Place
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.names import METRICS, MODEL, RECIPE
from ecoflap.run.provenance import source_digest
from ecoflap.support.progress import Progress
from ecoflap.support.reading import read_json

# Fields of the comparison that are also used for the training data.
_SAME = (
    "columns", "prompt", "objective", "image_folder", "classes", "class_prompts", "batch_size", "sequence_length",
    "window_start", "include", "exclude", "towers", "device", "dtype", "trust_remote_code",
)  # fmt: skip


def training_recipe(grid: Grid, place: Place) -> UPop:
    """The recipe of one cell, as for ``ecoflap upop``.

    Raises:
        InvalidOption: there is no training data, or the value of an option is out of range.
    """
    from ecoflap.support import embedded

    if grid.train is None:
        raise InvalidOption(f"method '{place.method.name}' needs training data: give --train FILE")
    same = {name: getattr(grid, name) for name in _SAME if name in grid.model_fields_set}
    own = {"train": grid.train, "sparsity": place.sparsity, "seed": place.seed, **place.method.fields}
    # The embedded model by its path: without a path, its own tests would be added.
    return UPop.parse({"model": grid.model or str(embedded.model_path()), **same, **own})


def training_inputs(grid: Grid) -> dict[str, str]:
    """Digests of the training data."""
    digest = source_digest(grid.train) if grid.train else None
    return {"training data": digest} if digest else {}


def trained(grid: Grid, place: Place, folder: Path, progress: Progress) -> tuple[Checkpoint, Mapping[str, Any]]:
    """Train, or resume, and return the model of one cell and its sparsity, as in ``metrics.json``.

    Args:
        folder: of the training; it is removed at the end.
    """
    from ecoflap.run.finetune.pipeline import run_finetune

    recipe = training_recipe(grid, place)
    run_finetune(recipe, folder, resume=(folder / RECIPE).is_file(), progress=progress)
    found = load_checkpoint(recipe.model_copy(update={"model": str(folder / MODEL), "dtype": "auto"}))
    sparsity: Mapping[str, Any] = read_json(folder / METRICS, "the training's metrics", InvalidOption)["sparsity"]
    shutil.rmtree(folder)
    return found, sparsity
