"""The stages between a plan and a sparse model, as a run and each cell of a comparison call them."""

from __future__ import annotations

from ecoflap.allocation import Allocation
from ecoflap.api import check_allocation, prune_to
from ecoflap.importance.measure import EstimateJournal
from ecoflap.importance.scores import Importance
from ecoflap.prepare import Prepared, measure, shared_out
from ecoflap.progress import Progress
from ecoflap.pruning.walk import BlockJournal
from ecoflap.statistics.choice import TokenChoice


def importance_for(plan: Prepared, progress: Progress, journal: EstimateJournal | None = None) -> Importance:
    """Stage 1: the scores that the recipe's file holds, none for ``uniform``, else measured ones.

    Args:
        journal: estimates that are known already, and where new ones go.

    Raises:
        EcoflapError: as :func:`ecoflap.measure_importance`.
    """
    if plan.importance is not None:
        return plan.importance
    if plan.recipe.importance == "uniform":
        return Importance.uniform(plan.anatomy.layers, plan.anatomy.total_parameters)
    return measure(plan.recipe, plan.checkpoint.model, plan.batches, plan.anatomy, plan.objective, progress, journal)


def allocation_for(plan: Prepared, importance: Importance, progress: Progress) -> Allocation:
    """Scores to zeros for each layer. The one place where an allocation is made of an importance.

    Raises:
        InfeasibleAllocation: the sparsity can't be reached.
        InvalidOption: it can't be made with the pattern.
    """
    allocation = shared_out(plan.recipe, importance)
    check_allocation(plan.anatomy, allocation, plan.recipe.pattern)
    return allocation


def pruned_to(
    plan: Prepared, allocation: Allocation, progress: Progress, journal: BlockJournal | None = None
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
    )
