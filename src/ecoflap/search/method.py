"""Defines a method, one choice for each step, and checks it before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.data.batches import first_samples, warn_if_fewer
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.importance.allocate import allocate_scores, flat
from ecoflap.importance.fits import check_allocation, check_same_layers
from ecoflap.importance.measure import ImportanceOptions
from ecoflap.importance.registry import AUTO, named, own_rule
from ecoflap.importance.scores import Importance
from ecoflap.model.parts import Anatomy
from ecoflap.pruning.offloaded import check_offloaded
from ecoflap.pruning.prune import PruningOptions
from ecoflap.pruning.recovery import recovery_options
from ecoflap.pruning.registry import DEFAULT, is_global, reads_data, refuse_with_global, tokens_of
from ecoflap.search.options import SearchOptions
from ecoflap.search.search import search_options as checked_search_options
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.tokens import check_choice

Given = Importance | Allocation | None  # scores or an allocation from an earlier run


@dataclass(frozen=True)
class Method:
    """The options of stage 1, allocation, search and stage 2."""

    importance: ImportanceOptions
    allocation: AllocationOptions
    pruning: PruningOptions
    search: SearchOptions | None = None

    @property
    def reads_data(self) -> bool:
        """Whether calibration samples decide the result."""
        chosen = self.importance.measured or self.search is not None
        return chosen or reads_data(self.pruning.criterion) or self.pruning.recovery is not None

    def check_options(self) -> None:
        """Raise InvalidOption or UnknownName for an unknown option, a wrong value or a contradiction."""
        self.pruning.made()
        if self.importance.name is not None:  # the allocation is made here
            self.allocation.check_reach()
        self.importance.check(self.allocation.granularity)

    def check(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Check the method against model and calibration batches.

        Raises:
            InvalidOption, UnknownName: as :meth:`check_options`; or the method can't work on an offloaded model.
            CalibrationError: there are no or too few samples, or a choice of tokens without visual tokens.
        """
        self.check_options()
        pruning, searched = self.pruning, self.search is not None
        needs = "pair" if pruning.recovery is not None else getattr(pruning.made(), "statistics", "none")
        check_choice(pruning.tokens, model, batches, needs)
        measured = self.importance.name if self.importance.measured else None
        check_offloaded(model, measured, pruning.criterion, searched, pruning.recovery is not None)
        if not len(batches) and self.reads_data:
            raise CalibrationError("no calibration batches: give at least one")
        if self.importance.measured:
            warn_if_fewer(batches, self.importance.samples)
        if self.search is not None:
            first_samples(batches, self.search.samples or None)

    def check_layers(self, anatomy: Anatomy, given: Given = None) -> None:
        """Check the method against the layers: without scores, tries the allocation with equal scores.

        Raises:
            InvalidOption: ``given`` belongs to another model, or the allocation does not fit the pattern.
            InfeasibleAllocation: the sparsity can't be reached.
        """
        allocation = given if isinstance(given, Allocation) else None
        if isinstance(given, Importance):
            check_same_layers(anatomy, given)
        if allocation is None:
            uniform, rule = self.importance.name == "uniform", own_rule(self.importance.name or "")
            scores = Importance.uniform(anatomy.layers) if uniform else flat(anatomy, rule)
            allocation = allocate_scores(given if isinstance(given, Importance) else scores, self.allocation)
        check_allocation(anatomy, allocation, self.allocation.pattern)


def make_method(
    *,
    importance: str | Importance | None = None,
    importance_options: Mapping[str, Any] | None = None,
    importance_samples: int | None = None,
    importance_error: float | None = None,
    criterion: str = DEFAULT,
    criterion_options: Mapping[str, Any] | None = None,
    compare: str | None = None,
    tokens: str | TokenChoice | None = None,
    offload_activations: bool | str = "none",
    allocation: Any = None,
    search: bool | None = None,
    search_options: Mapping[str, Any] | None = None,
    recover: bool = False,
    recover_options: Mapping[str, Any] | None = None,
    **shares: Any,
) -> Method:
    """A method from options by their names in a recipe; ``shares`` are those of the allocation.

    Raises:
        InvalidOption, UnknownName: an option is unknown, or contradicts another one.
    """
    name = importance.method if isinstance(importance, Importance) else importance
    if is_global(criterion):
        given = {
            "importance": name,
            "importance_options": importance_options,
            "allocation": None if allocation is None else "that is given",
            "compare": compare,
            "search": search,
            "search_options": search_options,
            **shares,
        }
        refuse_with_global(criterion, given)
        importance, shares = "uniform", {**shares, "max_sparsity": 1.0}
    if importance is None and allocation is None and shares.get("pattern", "unstructured") != "unstructured":
        importance = "uniform"  # N:M fixes every layer's sparsity
    known = allocation is not None or isinstance(importance, Importance) or (name or "").endswith(".json")
    stage1 = ImportanceOptions(
        None if known else named(str(importance or AUTO), importance_options or ()),
        dict(importance_options or {}),
        importance_samples,
        importance_error,
    )
    if search and allocation is not None:
        raise InvalidOption("search: an allocation is given, so there is nothing to search")
    if recover_options and not recover:
        raise InvalidOption("recover_options say how weights are recovered: give recover, too")
    options = checked_search_options(search_options)
    searched = stage1.name == "sensitivity" if search is None else search
    choice = tokens if isinstance(tokens, TokenChoice) else tokens_of(criterion, tokens)
    return Method(
        stage1,
        AllocationOptions(**shares),
        PruningOptions(
            criterion, dict(criterion_options or {}), compare, choice, offload_activations,
            recovery_options(recover_options) if recover else None,
        ),
        options if searched else None,
    )  # fmt: skip
