"""A recipe's model, in memory or not, and what can be done with one that is not, told before anything starts."""

from __future__ import annotations

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance.registry import BLOCKWISE
from ecoflap.model.offload import adopt, is_offloaded
from ecoflap.pruning.registry import is_global

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


def check_in_memory(model: nn.Module, what: str) -> None:
    """Raises InvalidOption where ``what`` is asked of an offloaded model."""
    if is_offloaded(model):
        raise InvalidOption(f"{what} needs all weights in memory, and {_WHY}: leave out --device-map")
