"""What evaluations, stages and walks say of a cell, as records of ``compare.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ecoflap.comparison.recipe import Place
from ecoflap.comparison.record import Cell, Quality, Seconds, Test
from ecoflap.comparison.scores import Took
from ecoflap.evaluation import TaskResult
from ecoflap.evaluations import Evaluation
from ecoflap.pipeline import quality
from ecoflap.resources import Usage

# Words of metrics of which less is better; all others are shares, recalls or scores.
_LESS = ("perplexity", "bits_per_byte", "loss", "error", "brier", "wer", "rmse")


def higher_is_better(metric: str) -> bool:
    """Whether more of ``metric`` is better: not for perplexities, losses and errors."""
    return not any(word in metric.lower().replace(" ", "_") for word in _LESS)


def quality_of(result: TaskResult) -> Quality:
    """A task's result as a record."""
    return Quality.model_validate(quality(result))


def test_of(entry: Evaluation, dense: TaskResult) -> Test:
    """One test, with what the dense model reached in it."""
    return Test(
        name=entry.name,
        task=entry.task,
        metric=dense.metric,
        higher_is_better=higher_is_better(dense.metric),
        dense=quality_of(dense),
    )


def cell_of(
    place: Place,
    *,
    error: str | None = None,
    results: Mapping[str, Quality] | None = None,
    sparsity: Mapping[str, Any] | None = None,
    took: Took | None = None,
    usages: Sequence[Usage] = (),
) -> Cell:
    """A finished cell.

    Args:
        error: why it can't be made; then nothing else is given.
        results: of the tests by their names, the first one first.
        sparsity: see :func:`ecoflap.summary.sparsity_summary`.
        took: what the measurement of the importance took, by which cell ever.
        usages: of the stages allocation, pruning and evaluation.
    """
    name, seed = place.method.name, place.seed
    if error is not None or results is None or sparsity is None:
        return Cell(method=name, sparsity=place.sparsity, seed=seed, error=error or "nothing was measured")
    took = took or Took()
    first = next(iter(results.values()))
    memory = [took.peak_memory_bytes or 0, *(usage.peak_memory_bytes for usage in usages)]
    cuda = [bytes_ for bytes_ in (took.peak_cuda_bytes, *(u.peak_cuda_bytes for u in usages)) if bytes_ is not None]
    return Cell(
        method=name,
        sparsity=place.sparsity,
        seed=seed,
        value=first.value,
        stderr=first.stderr,
        n=first.n,
        others=first.others,
        tests=dict(results),
        achieved=sparsity["prunable"],
        towers={name: tower["sparsity"] for name, tower in sparsity["towers"].items()},
        seconds=Seconds(importance=took.seconds, **{usage.name: usage.seconds for usage in usages}),
        peak_memory_bytes=max(memory),
        peak_cuda_bytes=max(cuda, default=None),
    )
