"""Checks before stage 1 whether a measure works on an offloaded model, with one block in memory at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.importance.registry import AUTO, IMPORTANCES
from ecoflap.model.offload import OFFLOADED, is_offloaded, keep_placeholders

_PROJECTIONS = ("zeroth-order", "forward-mode")


def check_blockwise(importance: str) -> None:
    """Raises InvalidOption for an importance that needs more than one block in memory."""
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
    """Call :func:`check_blockwise` and prepare the model if it is offloaded; do nothing otherwise."""
    if is_offloaded(model):
        keep_placeholders(model)
        check_blockwise(importance)
