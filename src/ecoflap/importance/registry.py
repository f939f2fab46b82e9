"""The table of importance measures: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

AUTO = "auto"  # gradient norms where the model can be differentiated, else the zeroth order
GRADIENT_NORM, ZEROTH_ORDER = "gradient-norm", "zeroth-order"
_GRADIENT_OPTIONS = frozenset(("recompute",))


def named(importance: str, options: Iterable[str]) -> str:
    """The importance that its options belong to, where ``auto`` leaves it open; else as it is.

    Args:
        options: their names. Those of gradient norms ask for these, all others for the zeroth order.
    """
    names = frozenset(options)
    if importance != AUTO or not names:
        return importance
    return GRADIENT_NORM if names <= _GRADIENT_OPTIONS else ZEROTH_ORDER


# Those that need the weights of one block at a time, so that the rest may lie on the disk.
BLOCKWISE = ("gradient-norm", "first-order", "owl", "dlp", "alphapruning", "uniform")

# Those whose attribute ``rule`` is not "proportional"; here so that a recipe can be resolved without importing torch.
_RULES = {"owl": "linear", "alphapruning": "linear-relative", "dlp": "linear", "sensitivity": "curves"}


def own_rule(importance: str) -> str:
    """The allocation rule that an importance's scores are made for."""
    return _RULES.get(importance, "proportional")
