"""The uniform baseline of a run: the same criterion on the same samples, with one sparsity for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ecoflap.importance.allocate import allocate_scores
from ecoflap.importance.scores import Importance
from ecoflap.model.kept_weights import KeptWeights
from ecoflap.model.offload import check_in_memory
from ecoflap.pruning.prune import prune_layers
from ecoflap.run.prepare import Prepared
from ecoflap.support.progress import Labelled, Progress
from ecoflap.support.workers import Workers


@contextmanager
def pruned_uniformly(plan: Prepared, progress: Progress, workers: Workers) -> Iterator[None]:
    """Context in which the model has one sparsity in all layers; at exit its dense weights are restored.

    Budgets are those of the run: with ``budget=tower`` each tower has its own sparsity. A copy of the prunable weights
    is in memory meanwhile.

    Raises:
        InvalidOption: the weights are not in memory.
    """
    model, anatomy, batches = plan.parts
    check_in_memory(model, "--baseline")
    method = plan.recipe.method()
    shares = replace(
        method.allocation, rule=None, spread=None, granularity="block", aggregate=None, min_sparsity=0.0,
        max_sparsity=1.0,
    )  # fmt: skip
    allocation = allocate_scores(Importance.uniform(anatomy.layers, anatomy.total_parameters), shares)
    kept = KeptWeights(model, list(dict.fromkeys(layer.parameter for layer in anatomy.layers)))
    try:
        work = plan.work(Labelled(progress, "baseline"), workers)
        prune_layers(model, anatomy, allocation, batches, method.pruning, method.allocation, work)
        yield
    finally:
        kept.restore()
