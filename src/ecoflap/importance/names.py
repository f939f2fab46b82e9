"""The table of importance measures: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ecoflap.registry import Registry

if TYPE_CHECKING:
    from ecoflap.importance.probe import ImportanceMeasure

IMPORTANCES: Registry[Callable[..., ImportanceMeasure]] = Registry(
    "importance",
    {
        "zeroth-order": "ecoflap.importance.zeroth_order:ZerothOrder",
        "gradient-norm": "ecoflap.importance.gradient_norm:GradientNorm",
        "first-order": "ecoflap.importance.first_order:FirstOrder",
        "uniform": "ecoflap.importance.uniform:Uniform",
    },
)
