"""The stages between a plan and a sparse model, as a run and each cell of a comparison call them."""

from __future__ import annotations

import logging

from ecoflap.allocation import Allocation
from ecoflap.api import check_allocation, prune_to
from ecoflap.importance.measure import EstimateJournal
from ecoflap.importance.scores import Importance
from ecoflap.prepare import Prepared, measure, shared_out
from ecoflap.progress import Progress
from ecoflap.pruning.walk import BlockJournal
from ecoflap.search.start import search_allocation, search_options
from ecoflap.search.state import SearchJournal
from ecoflap.statistics.choice import TokenChoice
from ecoflap.workers import ALONE, Workers

_log = logging.getLogger("ecoflap")


def importance_for(
    plan: Prepared, progress: Progress, journal: EstimateJournal | None = None, workers: Workers = ALONE
) -> Importance:
    """Stage 1: the scores that the recipe's file holds, none for ``uniform``, else measured ones.

    Args:
        journal: estimates that are known already, and where new ones go.
        workers: those who have the plan alike; so below.

    Raises:
        EcoflapError: as :func:`ecoflap.measure_importance`.
    """
    if plan.importance is not None:
        return plan.importance
    if plan.recipe.importance == "uniform":
        return Importance.uniform(plan.anatomy.layers, plan.anatomy.total_parameters)
    return measure(
        plan.recipe, plan.checkpoint.model, plan.batches, plan.anatomy, plan.objective, progress, journal, workers,
        plan.norms,
    )  # fmt: skip


def allocation_for(
    plan: Prepared,
    importance: Importance,
    progress: Progress,
    journal: SearchJournal | None = None,
    workers: Workers = ALONE,
) -> Allocation:
    """Scores to zeros for each layer, and the search from there where the recipe asks for it.

    The one place where an allocation is made of an importance.

    Args:
        journal: of the search: what is done already, and where more goes.

    Raises:
        InfeasibleAllocation: the sparsity can't be reached.
        InvalidOption: it can't be made with the pattern.
    """
    recipe, model = plan.recipe, plan.checkpoint.model
    allocation = shared_out(recipe, importance)
    check_allocation(plan.anatomy, allocation, recipe.pattern)
    if not recipe.search:
        return allocation
    found = search_allocation(
        model,
        plan.anatomy,
        allocation,
        plan.batches,
        criterion=recipe.criterion,
        criterion_options=recipe.criterion_options,
        compare=recipe.compare,
        loss=plan.objective,
        shares=recipe.shares(),
        options=search_options(recipe.search_options),
        tokens=TokenChoice(recipe.tokens, recipe.top_tokens),
        seed=recipe.seed,
        progress=progress,
        journal=journal,
        workers=workers,
        norms=plan.norms,
    )
    losses = ", ".join(f"{loss:.4g}" for loss in found.record.losses)
    _log.info("allocation search, %s after every step: %s", found.record.metric, losses)
    return found.recorded


def pruned_to(
    plan: Prepared,
    allocation: Allocation,
    progress: Progress,
    journal: BlockJournal | None = None,
    workers: Workers = ALONE,
) -> tuple[Allocation, tuple[str, ...]]:
    """Stage 2, in place: the allocation with what was achieved, and the layers that no calibration token reached.

    Args:
        journal: blocks that are pruned already, and where new ones go.

    Raises:
        NonFiniteLoss: names the layer.
    """
    recipe = plan.recipe
    return prune_to(
        plan.checkpoint.model,
        plan.anatomy,
        allocation,
        plan.batches,
        criterion=recipe.criterion,
        criterion_options=recipe.criterion_options,
        budget=recipe.budget,
        tower_sparsity=recipe.tower_sparsity,
        pattern=recipe.pattern,
        compare=recipe.compare,
        loss=plan.objective,
        offload_activations=recipe.offload_activations,
        tokens=TokenChoice(recipe.tokens, recipe.top_tokens),
        progress=progress,
        journal=journal,
        workers=workers,
    )
