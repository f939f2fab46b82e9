"""The table of criteria, and what a criterion for the whole model goes together with. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption
from ecoflap.support.registry import Registry

if TYPE_CHECKING:
    from ecoflap.pruning.criteria import Criterion, GlobalCriterion

CRITERIA: Registry[Callable[..., Criterion | GlobalCriterion]] = Registry(
    "criterion",
    {
        "wanda": "ecoflap.pruning.wanda:Wanda",
        "sparsegpt": "ecoflap.pruning.sparsegpt:SparseGPT",
        "admm": "ecoflap.pruning.admm:ADMM",
        "magnitude": "ecoflap.pruning.magnitude:Magnitude",
        "global-magnitude": "ecoflap.pruning.whole_model:GlobalMagnitude",
        "iterative-gradient": "ecoflap.pruning.whole_model:IterativeGradient",
    },
)

# Those that compare weights of different layers, and so decide the sparsity of each layer themselves.
_GLOBAL = frozenset({"global-magnitude", "iterative-gradient"})
_WITHOUT_DATA = frozenset({"magnitude", "global-magnitude"})

# With them, these options of the allocation and of the mask could change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "importance": (None, "uniform"),
    "importance_options": (None, {}),
    "allocation": (None,),
    "pattern": ("unstructured",),
    "compare": (None,),
    "max_sparsity": (None, 1.0),
    "min_sparsity": (0.0,),
    "granularity": ("block",),
    "aggregate": (None, "sum"),
    "rule": (None,),
    "spread": (None,),
    "tokens": ("all",),
    "search": (None, False),
    "search_options": (None, {}),
}


def is_global(criterion: str) -> bool:
    """Whether the criterion compares weights over the whole model (or tower), and needs no allocation."""
    return criterion in _GLOBAL


def reads_data(criterion: str) -> bool:
    """Whether the criterion looks at calibration samples."""
    return criterion not in _WITHOUT_DATA


def refuse_with_global(criterion: str, given: Mapping[str, Any]) -> None:
    """Refuse options that can have no effect beside a global criterion.

    Args:
        given: options by their names in a recipe; those that a global criterion leaves room for are not looked at.

    Raises:
        InvalidOption: names the first that is out of place, and what to do.
    """
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            neutral = _NEUTRAL[name][-1]
            instead = f" or give {neutral}" if isinstance(neutral, str | float) else ""
            raise InvalidOption(
                f"criterion '{criterion}' decides every layer's sparsity itself, so {name} {value} could change "
                f"nothing: leave it out{instead}"
            )
