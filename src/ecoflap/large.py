"""A recipe's model, in memory or not, and what can be done with one that is not, told before anything starts."""

from __future__ import annotations

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance.names import BLOCKWISE
from ecoflap.network.checkpoint import Checkpoint, load
from ecoflap.network.dispatch import DISK
from ecoflap.network.offload import adopt, is_offloaded
from ecoflap.processes import device_of
from ecoflap.pruning.names import is_global
from ecoflap.recipe import Recipe
from ecoflap.workers import ALONE, Workers

_WHY = "some of the model's weights are on the disk or in the computer's memory (device map)"


def check_blockwise(importance: str | None, criterion: str | None = None, search: bool | None = False) -> None:
    """Raises InvalidOption for what needs more of a model than one block at a time.

    Args:
        importance: a measure's name; None for one that is measured already.
        criterion: None where nothing is pruned.
    """
    if criterion is not None and is_global(criterion):
        raise InvalidOption(f"criterion '{criterion}' needs all weights in memory, and {_WHY}: take a local one, "
                            "such as wanda")  # fmt: skip
    if importance is not None and importance not in BLOCKWISE:
        near = "gradient-norm (the same quantity without noise), " if importance in _PROJECTIONS else ""
        raise InvalidOption(
            f"importance '{importance}' runs the model again for every matrix, and {_WHY}: "
            f"take {near}{', '.join(name for name in BLOCKWISE if name not in near)}, or an importance.json"
        )
    if search:
        raise InvalidOption(f"search prunes the whole model at a time, and {_WHY}: add --no-search")


_PROJECTIONS = ("zeroth-order", "forward-mode")


def check_model(
    model: nn.Module, importance: str | None, criterion: str | None = None, search: bool | None = False
) -> None:
    """:func:`check_blockwise` for an offloaded model, which is made ready for the work; nothing for another one."""
    if is_offloaded(model):
        adopt(model)
        check_blockwise(importance, criterion, search)


def load_checkpoint(recipe: Recipe, whole: str | None = None, workers: Workers = ALONE) -> Checkpoint:
    """The recipe's model with its processor, on this worker's device.

    Args:
        whole: what is to be done that needs all weights in memory, for the message.

    Raises:
        InvalidOption: they are not.
    """
    if whole is not None and recipe.device_map == DISK:
        raise InvalidOption(f"{whole} needs all weights in memory: leave out --device-map {DISK}")
    found = load(
        recipe.model,
        dtype=recipe.dtype,
        device=device_of(recipe.device, workers),
        trust_remote_code=recipe.trust_remote_code,
        device_map=recipe.device_map,
        max_memory=recipe.max_memory,
    )
    if whole is not None:
        check_in_memory(found.model, whole)
    return found


def check_in_memory(model: nn.Module, what: str) -> None:
    """Raises InvalidOption where ``what`` is asked of an offloaded model."""
    if is_offloaded(model):
        raise InvalidOption(f"{what} needs all weights in memory, and {_WHY}: leave out --device-map")
