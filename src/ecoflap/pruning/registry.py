"""Registers the criteria, and checks the options beside a global criterion. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption
from ecoflap.statistics.choice import EXPERT_TOKENS, TokenChoice
from ecoflap.support.registry import Registry, dataclass_complaint, entry

if TYPE_CHECKING:
    from ecoflap.pruning.criteria import Criterion, GlobalCriterion


def _complaint(made: Any) -> str | None:
    if (wrong := dataclass_complaint(made)) is not None:
        return wrong
    whole_model = callable(getattr(made, "targets", None))  # a method: a local rule may have an option of this name
    if whole_model != bool(getattr(made, "is_global", False)):
        return "must say is_global = True, and have targets(), if it is for the whole model; neither for single layers"
    if whole_model:
        needed: tuple[str, ...] = ("targets", "steps", "scores")
    else:
        needed = ("name", "statistics", "default_compare", "order", "__call__")
    missing = [name for name in needed if not hasattr(made, name)]
    return f"must have {', '.join(missing)}, see ecoflap.pruning.criteria" if missing else None


# Each with the attributes that the command line needs before importing torch: whether it is global (compares weights of
# different layers, and so decides each layer's sparsity), whether it reads calibration samples, its default choice of
# tokens if not all, and its papers.
CRITERIA: Registry[Callable[..., Criterion | GlobalCriterion]] = Registry(
    "criterion",
    {
        "wanda": entry("ecoflap.pruning.wanda:Wanda", cites=("wanda",)),
        "sparsegpt": entry("ecoflap.pruning.sparsegpt:SparseGPT", cites=("sparsegpt",)),
        "admm": entry("ecoflap.pruning.admm:ADMM", tokens="balanced", cites=("admm-update", "alps", "gptaq")),
        "magnitude": entry("ecoflap.pruning.magnitude:Magnitude", reads_data=False, cites=("magnitude",)),
        "global-magnitude": entry(
            "ecoflap.pruning.whole_model:GlobalMagnitude", is_global=True, reads_data=False, cites=("magnitude",)
        ),
        "iterative-gradient": entry("ecoflap.pruning.whole_model:IterativeGradient", is_global=True, cites=("obd",)),
    },
    group="ecoflap.criteria",
    complaint=_complaint,
)

DEFAULT = "admm"
BEFORE_ADMM = "wanda"  # the default of earlier versions, for runs that record no criterion

# Options of the allocation and of the mask that have no effect with a global criterion.
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
    "tokens": (None, "all"),
    "search": (None, False),
    "search_options": (None, {}),
}


def tokens_of(
    criterion: str, given: str | None = None, amount: float | None = None, experts: int = EXPERT_TOKENS
) -> TokenChoice:
    """The choice of tokens for a criterion's statistics: the given one, else the criterion's default.

    With the default, a model without visual tokens in its text is no error: all tokens count then.

    Raises:
        InvalidOption, UnknownName: the choice is invalid.
    """
    name = given or str(CRITERIA.fact(criterion, "tokens", "all"))
    return TokenChoice(name, amount, experts, required=given is not None or amount is not None)


def is_global(criterion: str) -> bool:
    """Whether the criterion compares weights over the whole model (or tower), so that it needs no allocation."""
    return bool(CRITERIA.fact(criterion, "is_global", False))


def reads_data(criterion: str) -> bool:
    """Whether the criterion reads calibration samples."""
    return bool(CRITERIA.fact(criterion, "reads_data", True))


def refuse_with_global(criterion: str, given: Mapping[str, Any]) -> None:
    """Refuse options that have no effect with a global criterion.

    Args:
        given: options by their names in a recipe.

    Raises:
        InvalidOption: names the first such option, and what to do.
    """
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            neutral = _NEUTRAL[name][-1]
            instead = f" or give {neutral}" if isinstance(neutral, str | float) else ""
            raise InvalidOption(
                f"criterion '{criterion}' decides every layer's sparsity itself, so {name} {value} could change "
                f"nothing: leave it out{instead}"
            )
