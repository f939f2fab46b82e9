"""Checks before stage 2 whether a method can work on an offloaded model."""

from __future__ import annotations

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance import offloaded
from ecoflap.model.offload import OFFLOADED, is_offloaded, keep_placeholders
from ecoflap.pruning.registry import is_global


def check_blockwise(importance: str | None, criterion: str, search: bool = False, recover: bool = False) -> None:
    """Raises InvalidOption for what needs more of a model than one block at a time.

    Args:
        importance: a measure's name; None where the scores are given.
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
    """For an offloaded model, calls :func:`check_blockwise` and prepares the model; does nothing for another one."""
    if is_offloaded(model):
        keep_placeholders(model)
        check_blockwise(importance, criterion, search, recover)
