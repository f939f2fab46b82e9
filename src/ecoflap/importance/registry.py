"""Registers the importance measures: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ecoflap.support.registry import Registry, dataclass_complaint, entry

if TYPE_CHECKING:
    from ecoflap.importance.base import ImportanceMeasure


def _complaint(made: Any) -> str | None:
    from ecoflap.importance.base import ImportanceMeasure

    return dataclass_complaint(made, ImportanceMeasure)


# Each with the attributes that the command line needs before importing torch: its ``rule`` and its papers.
IMPORTANCES: Registry[Callable[..., ImportanceMeasure]] = Registry(
    "importance",
    {
        "zeroth-order": entry("ecoflap.importance.zeroth_order:ZerothOrder", cites=("ecoflap", "mezo")),
        "forward-mode": entry("ecoflap.importance.forward_mode:ForwardMode", cites=("forward-mode",)),
        "gradient-norm": entry("ecoflap.importance.gradient:GradientNorm", cites=("ecoflap",)),
        "first-order": entry("ecoflap.importance.gradient:FirstOrder", cites=("ecoflap",)),
        "owl": entry("ecoflap.importance.outliers:Owl", rule="linear", cites=("owl",)),
        "alphapruning": entry(
            "ecoflap.importance.alphapruning:AlphaPruning", rule="linear-relative", cites=("alphapruning",)
        ),
        "dlp": entry("ecoflap.importance.outliers:Dlp", rule="linear", cites=("dlp",)),
        "sensitivity": entry("ecoflap.search.sensitivity:Sensitivity", rule="curves"),
        "uniform": entry("ecoflap.importance.base:Uniform"),
    },
    group="ecoflap.importances",
    complaint=_complaint,
)

AUTO = "auto"  # gradient norms if the model can be differentiated, else the zeroth order
GRADIENT_NORM, ZEROTH_ORDER = "gradient-norm", "zeroth-order"
_GRADIENT_OPTIONS = frozenset(("recompute",))


def named(importance: str, options: Iterable[str]) -> str:
    """Resolve ``auto`` by the names of the given options: gradient norms if they have these options, else the zeroth
    order. Other names are returned unchanged."""
    names = frozenset(options)
    if importance != AUTO or not names:
        return importance
    return GRADIENT_NORM if names <= _GRADIENT_OPTIONS else ZEROTH_ORDER


def own_rule(importance: str) -> str:
    """The allocation rule that an importance's scores are made for."""
    return str(IMPORTANCES.fact(importance, "rule", "proportional"))
