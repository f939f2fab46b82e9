"""Checks before stage 2 whether a method works on an offloaded model."""

from __future__ import annotations

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance import offloaded
from ecoflap.model.offload import OFFLOADED, is_offloaded, keep_placeholders
from ecoflap.pruning.registry import is_global


def check_blockwise(importance: str | None, criterion: str, search: bool = False, recover: bool = False) -> None:
    """Raises InvalidOption for a method that needs more than one block in memory.

    Args:
        importance: a measure's name; None if the scores are given.
    """
    if is_global(criterion):
        raise InvalidOption(f"criterion '{criterion}' needs all weights in memory, and {OFFLOADED}: take a local one, "
                            "such as wanda")  # fmt: skip
    if importance is not None:
        offloaded.check_blockwise(importance)
    if search:
        raise InvalidOption(f"search prunes the whole model at a time, and {OFFLOADED}: add --no-search")
    if recover:
        raise InvalidOption(f"recover needs all weights in memory, and {OFFLOADED}: take criterion admm in its place")


def check_offloaded(
    model: nn.Module, importance: str | None, criterion: str, search: bool = False, recover: bool = False
) -> None:
    """Call :func:`check_blockwise` and prepare the model if it is offloaded; do nothing otherwise."""
    if is_offloaded(model):
        keep_placeholders(model)
        check_blockwise(importance, criterion, search, recover)
