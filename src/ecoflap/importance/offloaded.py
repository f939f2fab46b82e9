"""Checks before stage 1 whether a measure can work on an offloaded model, one block at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance.registry import AUTO, IMPORTANCES
from ecoflap.model.offload import OFFLOADED, is_offloaded, keep_placeholders

_PROJECTIONS = ("zeroth-order", "forward-mode")


def check_blockwise(importance: str) -> None:
    """Raises InvalidOption for an importance that needs more of a model than one block at a time."""
    if importance == AUTO or _is_blockwise(importance):
        return
    near = "gradient-norm (the same quantity without noise), " if importance in _PROJECTIONS else ""
    others = [name for name in IMPORTANCES.own() if name not in near and _is_blockwise(name)]
    raise InvalidOption(
        f"importance '{importance}' runs the model again for every matrix, and {OFFLOADED}: "
        f"take {near}{', '.join(others)}, or an importance.json"
    )


def _is_blockwise(importance: str) -> bool:
    measure: Any = IMPORTANCES.get(importance)
    return bool(measure.blockwise)


def check_offloaded(model: nn.Module, importance: str) -> None:
    """For an offloaded model, calls :func:`check_blockwise` and prepares the model; does nothing for another one."""
    if is_offloaded(model):
        keep_placeholders(model)
        check_blockwise(importance)
