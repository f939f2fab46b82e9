"""The table of importance measures: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ecoflap.support.registry import Registry

if TYPE_CHECKING:
    from ecoflap.importance.base import ImportanceMeasure

IMPORTANCES: Registry[Callable[..., ImportanceMeasure]] = Registry(
    "importance",
    {
        "zeroth-order": "ecoflap.importance.zeroth_order:ZerothOrder",
        "forward-mode": "ecoflap.importance.forward_mode:ForwardMode",
        "gradient-norm": "ecoflap.importance.gradient:GradientNorm",
        "first-order": "ecoflap.importance.gradient:FirstOrder",
        "owl": "ecoflap.importance.outliers:Owl",
        "alphapruning": "ecoflap.importance.alphapruning:AlphaPruning",
        "dlp": "ecoflap.importance.outliers:Dlp",
        "sensitivity": "ecoflap.search.sensitivity:Sensitivity",
        "uniform": "ecoflap.importance.base:Uniform",
    },
)

# Those that need the weights of one block at a time, so that the rest may lie on the disk.
BLOCKWISE = ("gradient-norm", "first-order", "owl", "dlp", "alphapruning", "uniform")

# Those whose attribute ``rule`` is not "proportional"; here so that a recipe can be resolved without importing torch.
_RULES = {"owl": "linear", "alphapruning": "linear-relative", "dlp": "linear", "sensitivity": "curves"}


def own_rule(importance: str) -> str:
    """The allocation rule that an importance's scores are made for."""
    return _RULES.get(importance, "proportional")
