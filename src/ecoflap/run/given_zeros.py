"""Runs on the zeros of a model that is pruned already: reads that model, and does stage 2 with its zeros."""

from __future__ import annotations

from dataclasses import replace

from ecoflap.model.activation_store import offload_kind
from ecoflap.model.offload import check_in_memory
from ecoflap.pruning.journal import BlockJournal
from ecoflap.pruning.recovery import (
    RecoveryOptions,
    allocation_of_zeros,
    recover_layers,
    sparse_part,
    weights_to_recover,
)
from ecoflap.pruning.walk import WalkResult
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.prepare import Prepared
from ecoflap.support.progress import Progress
from ecoflap.support.workers import Workers


def with_given_zeros(plan: Prepared) -> Prepared:
    """The plan with the zeros of the recipe's pruned model, and their sparsity in the recipe.

    Raises:
        CheckpointError: the pruned model can't be read, or is packed.
        InvalidOption: the two models do not match, or nothing is pruned.
    """
    recipe, model = plan.recipe, plan.checkpoint.model
    if recipe.pruned is None:
        return plan
    check_in_memory(model, "recover")
    other = load_checkpoint(recipe.model_copy(update={"model": recipe.pruned, "device": "cpu", "device_map": None}))
    names = f"'{plan.checkpoint.source}'", f"'{other.source}'"
    pruned = weights_to_recover(model, other.model, plan.anatomy, names)
    anatomy = sparse_part(plan.anatomy, pruned, model)
    allocation = allocation_of_zeros(anatomy, pruned)
    shares = {"sparsity": round(allocation.sparsity, 6), "max_sparsity": round(allocation.max_sparsity, 6)}
    settled = recipe.model_copy(update=shares)
    return replace(plan, recipe=settled, anatomy=anatomy, allocation=allocation, pruned=pruned)


def recovered(plan: Prepared, progress: Progress, journal: BlockJournal | None, workers: Workers) -> WalkResult:
    """Stage 2 of such a plan, in place: fits the nonzero weights to the dense model's outputs."""
    assert plan.pruned is not None
    model, anatomy, batches = plan.parts
    options = plan.recipe.method().pruning
    return recover_layers(
        model, anatomy, plan.pruned, batches, options.recovery or RecoveryOptions(), plan.work(progress, workers),
        journal, offload=offload_kind(options.offload_activations), tokens=options.tokens,
    )  # fmt: skip
