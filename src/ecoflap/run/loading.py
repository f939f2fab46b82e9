"""Loads the model that a recipe names, and refuses offloaded or packed weights if the work can't use them."""

from __future__ import annotations

from difflib import get_close_matches

from ecoflap.errors import AnatomyError, CheckpointError, InvalidOption
from ecoflap.model.anatomy import discover
from ecoflap.model.checkpoint import Checkpoint, empty_model, load
from ecoflap.model.device_map import DISK
from ecoflap.model.files import PACKED, is_open_clip, locate
from ecoflap.model.offload import check_in_memory
from ecoflap.run.recipe import Recipe
from ecoflap.support.processes import device_of
from ecoflap.support.progress import LOADING, Progress, Silent
from ecoflap.support.workers import ALONE, Workers

MODALITIES = ("vision", "language", "audio")


def check_parts(recipe: Recipe) -> None:
    """Check the plain names that a recipe gives of layers and towers, before any weights are read.

    They are looked for among the modules and parameters of the model on the meta device. Globs, which may select what
    only a forward shows, are left to :func:`ecoflap.model.anatomy.discover`.

    Raises:
        AnatomyError: the model has nothing of such a name.
    """
    given = (*recipe.include, *recipe.exclude, *(recipe.towers or ()), *(recipe.tower_sparsity or ()))
    asked = [name for name in given if name not in MODALITIES and not set("*?[") & set(name)]
    if not asked or recipe.model is None or recipe.trust_remote_code or is_open_clip(recipe.model):
        return
    try:
        files = locate(recipe.model)
        if files.gguf_file is not None:  # its header takes seconds to be read
            return
        model = empty_model(files)
    except CheckpointError:  # what is wrong with it is told when it is loaded
        return
    known = {path for path, _ in model.named_modules()} | {path for path, _ in model.named_parameters()}
    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'? " if near else ""
            towers = ", ".join(f"{tower.name} ({tower.modality})" for tower in discover(model).towers)
            raise AnatomyError(
                f"{type(model).__name__} has no layer or tower '{name}': {hint}its towers are {towers}; "
                "'ecoflap inspect' shows the layers"
            )


def load_checkpoint(
    recipe: Recipe,
    whole: str | None = None,
    workers: Workers = ALONE,
    packed: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """The recipe's model with its processor, on this worker's device.

    Args:
        whole: names the work for the error message if it needs all weights in memory.
        packed: whether weights may stay packed.
        progress: where to report, as a stage.

    Raises:
        InvalidOption: they are not in memory.
        CheckpointError: they are packed.
        AnatomyError: as :func:`check_parts`.
    """
    if whole is not None and recipe.device_map == DISK:
        raise InvalidOption(f"{whole} needs all weights in memory: leave out --device-map {DISK}")
    check_parts(recipe)
    with (progress or Silent()).stage(LOADING, total=1) as task:
        task.advance(0, recipe.model or "the embedded model")
        found = load(
            recipe.model,
            dtype=recipe.dtype,
            device=device_of(recipe.device, workers),
            trust_remote_code=recipe.trust_remote_code,
            device_map=recipe.device_map,
            max_memory=recipe.max_memory,
        )
        task.advance(1)
    if not packed and getattr(found.model, "quantization_method", None) == PACKED:
        raise CheckpointError(f"'{found.source}' is packed: unpack it first, 'ecoflap unpack MODEL --output DIR'")
    if whole is not None:
        check_in_memory(found.model, whole)
    return found
