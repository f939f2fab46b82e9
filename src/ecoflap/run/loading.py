"""Loads the model that a recipe names, and refuses offloaded or packed weights if the work can't use them."""

from __future__ import annotations

from ecoflap.errors import CheckpointError, InvalidOption
from ecoflap.model.checkpoint import Checkpoint, load
from ecoflap.model.device_map import DISK
from ecoflap.model.files import PACKED
from ecoflap.model.offload import check_in_memory
from ecoflap.run.recipe import Recipe
from ecoflap.support.processes import device_of
from ecoflap.support.progress import LOADING, Progress, Silent
from ecoflap.support.workers import ALONE, Workers


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
    """
    if whole is not None and recipe.device_map == DISK:
        raise InvalidOption(f"{whole} needs all weights in memory: leave out --device-map {DISK}")
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
