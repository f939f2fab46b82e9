"""Begins a search on a model as it is: statistics of the dense model, the criterion's order, the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ecoflap.allocation import Allocation
from ecoflap.calibration.objectives import Objective, on_device
from ecoflap.importance.measure import first_samples
from ecoflap.network.parts import Anatomy
from ecoflap.progress import Progress
from ecoflap.pruning.criteria import make_criterion
from ecoflap.pruning.patterns import Compare
from ecoflap.registry import check_option_names
from ecoflap.search.compensated import compensated
from ecoflap.search.order import Order
from ecoflap.search.orders import Orders
from ecoflap.search.refine import Found, refine
from ecoflap.search.state import SearchJournal, SearchOptions
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.dense import SharedNorms
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import nn


def search_options(options: Mapping[str, Any] | None) -> SearchOptions:
    """``SearchOptions`` of these names.

    Raises:
        InvalidOption: there is no such option, or its value is out of range.
        UnknownName: a value that is a name is unknown.
    """
    check_option_names("allocation", "search", [field.name for field in fields(SearchOptions)], options or {})
    return SearchOptions(**(options or {}))


def search_allocation(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    *,
    criterion: str,
    criterion_options: Mapping[str, Any] | None = None,
    compare: str | None,
    loss: Objective,
    shares: Mapping[str, Any],
    options: SearchOptions,
    tokens: TokenChoice = ALL,
    seed: int = 0,
    progress: Progress | None = None,
    journal: SearchJournal | None = None,
    workers: Workers = ALONE,
    norms: SharedNorms | None = None,
) -> Found:
    """:func:`ecoflap.search.refine.refine` from ``allocation``, for a registered local criterion.

    Args:
        batches: calibration batches; all of them make the statistics, the first ``options.samples`` are searched on.
        tokens: which tokens count in the statistics, as the criterion has it.
        compare: the user's ``row`` or ``matrix``; None for the criterion's own.
        journal: the same for all workers.
        workers: those who have model and batches alike.
        norms: of the same batches, shared with other searches.

    Raises:
        CalibrationError: fewer samples than the search is to have.
        NonFiniteLoss, InvalidOption: as there.
    """
    rule: Any = make_criterion(criterion, criterion_options)
    run, ranked = on_device(loss), _compare(compare)
    own = rule.statistics == "gram" and options.weights == "own"

    def made(statistics: Mapping[str, InputStatistics]) -> Order:
        if own:
            return compensated(statistics, rule, rule.damping, ranked)
        return Order.of(statistics, needs=rule.statistics, compare=ranked)

    return refine(
        model,
        anatomy,
        allocation,
        first_samples(batches, options.samples or None),
        Orders(model, anatomy, batches, run, "gram" if own else "norm", made, tokens, workers, norms or SharedNorms()),
        loss=loss,
        shares=shares,
        options=options,
        seed=seed,
        progress=progress,
        journal=journal,
        workers=workers,
    )


def _compare(text: str | None) -> Compare | None:
    return "row" if text == "row" else "matrix" if text == "matrix" else None
