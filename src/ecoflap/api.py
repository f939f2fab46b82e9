"""The algorithm on one page: importance, allocation, search, pruning (ECoFLaP, Sung et al. 2024, arXiv 2310.02998).

:func:`carry_out` is the algorithm. A run (:mod:`ecoflap.run.pipeline`) and a comparison call the same functions, with a
journal. :class:`~ecoflap.search.method.Method` holds one choice for each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.data.batches import as_batches
from ecoflap.data.computing import computed_in, first_run
from ecoflap.data.model_facts import to_device
from ecoflap.data.objectives import Objective, default_objective
from ecoflap.errors import CalibrationError
from ecoflap.importance.allocate import allocate, allocate_scores
from ecoflap.importance.fits import check_allocation
from ecoflap.importance.measure import EstimateJournal, measure
from ecoflap.importance.scores import Importance
from ecoflap.model.activation_store import offload_kind
from ecoflap.model.anatomy import discover
from ecoflap.model.compute import computing_in
from ecoflap.model.offload import check_in_memory
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.model.slices import stored_matrix
from ecoflap.pruning.journal import BlockJournal
from ecoflap.pruning.prune import PruningOptions, prune_layers
from ecoflap.pruning.recovery import recover_layers, recovery_options, sparse_part, weights_to_recover
from ecoflap.pruning.registry import DEFAULT, tokens_of
from ecoflap.pruning.restore import restored_on_failure
from ecoflap.search.method import Given, Method, make_method
from ecoflap.search.options import SearchJournal
from ecoflap.search.search import search_allocation
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import SharedNorms
from ecoflap.statistics.tokens import check_choice
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.work import Work
from ecoflap.support.workers import ALONE, Workers

__all__ = ["Method", "PruneResult", "allocate", "inspect", "prune", "recover"]


@dataclass(frozen=True, repr=False)
class PruneResult:
    """The result of :func:`prune`.

    Attributes:
        model: the given model, pruned in place.
        anatomy: its towers, blocks and layers, and the matrices that stay dense.
        importance: scores of stage 1; None if an allocation was given.
        allocation: target and achieved sparsity of each layer.
        unreached: layers that no calibration token reached; they are pruned with the statistics of all tokens of their
            mixture, or by magnitude.
    """

    model: nn.Module
    anatomy: Anatomy
    importance: Importance | None
    allocation: Allocation
    unreached: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the prunable weights."""
        zeros = sum((row.achieved or 0.0) * row.weights for row in self.allocation.layers)
        return zeros / self.allocation.total_weights

    def __repr__(self) -> str:
        anatomy, zeros = self.anatomy, self.sparsity * self.allocation.total_weights
        towers = ", ".join(f"{tower.name} ({tower.modality}, {len(tower.blocks)} blocks)" for tower in anatomy.towers)
        return "\n".join((
            f"PruneResult of {type(self.model).__name__}",
            f"  sparsity: {self.sparsity:.2%} of the prunable weights, {zeros / anatomy.total_parameters:.2%} of all",
            f"  towers: {towers}",
            f"  matrices: {len(anatomy.layers)} pruned, {len(anatomy.unprunable)} dense inside blocks",
            f"  unreached by calibration data: {len(self.unreached)}",
        ))  # fmt: skip

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def carry_out(
    model: nn.Module,
    batches: Sequence[Any],
    method: Method,
    work: Work,
    given: Given = None,
    **parts: Any,
) -> PruneResult:
    """Prune ``model`` in place by ``method``.

    Args:
        given: known scores, or a known allocation.
        parts: ``include``, ``exclude``, ``towers``: see :func:`ecoflap.model.anatomy.discover`.
    """
    method.check(model, batches)
    with cache_disabled(model), computing_in(model, work.compute):
        anatomy = discover(model, batches[0] if len(batches) else None, run=first_run(work.loss), **parts)
    method.check_layers(anatomy, given)
    method = replace(method, importance=method.importance.settled(model, anatomy, batches, work.loss))
    scores, allocation = None, given
    if not isinstance(allocation, Allocation):
        scores = importance_of(model, anatomy, batches, method, work, given)
        allocation = allocation_of(model, anatomy, batches, scores, method, work)
    with restored_on_failure(model, anatomy.layers):
        pruned = prune_layers(model, anatomy, allocation, batches, method.pruning, method.allocation, work)
    return PruneResult(model, anatomy, scores, pruned.allocation, pruned.unreached)


def importance_of(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    method: Method,
    work: Work,
    given: Given = None,
    journal: EstimateJournal | None = None,
    norms: SharedNorms | None = None,
) -> Importance:
    """Stage 1: the given scores, no scores for ``uniform``, else measured ones."""
    if isinstance(given, Importance):
        return given
    if not method.importance.measured:
        return Importance.uniform(anatomy.layers, anatomy.total_parameters)
    return measure(model, anatomy, batches, method.importance, work, journal, norms)


def allocation_of(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    scores: Importance,
    method: Method,
    work: Work,
    journal: SearchJournal | None = None,
    norms: SharedNorms | None = None,
) -> Allocation:
    """Turn scores into zeros for each layer, and improve these by a search if the method has one."""
    allocation = allocate_scores(scores, method.allocation)
    check_allocation(anatomy, allocation, method.allocation.pattern)
    if method.search is None:
        return allocation
    return search_allocation(
        model, anatomy, allocation, batches, method.search, method.allocation, method.pruning, work, journal, norms
    ).recorded


def prune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    sparsity: float = 0.5,
    *,
    importance: str | Importance | None = None,
    criterion: str = DEFAULT,
    criterion_options: Mapping[str, Any] | None = None,
    pattern: str = "unstructured",
    compare: str | None = None,
    max_sparsity: float | None = None,
    min_sparsity: float = 0.0,
    granularity: str = "block",
    aggregate: str | None = None,
    budget: str = "global",
    tower_sparsity: Mapping[str, float] | None = None,
    rule: str | None = None,
    spread: float | None = None,
    allocation: Allocation | None = None,
    search: bool | None = None,
    search_options: Mapping[str, Any] | None = None,
    importance_samples: int | None = None,
    importance_error: float | None = None,
    importance_options: Mapping[str, Any] | None = None,
    recover: bool = False,
    recover_options: Mapping[str, Any] | None = None,
    loss: Objective | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
    seed: int = 0,
    tokens: str | TokenChoice | None = None,
    offload_activations: bool | str = "none",
    compute_dtype: str = "auto",
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> PruneResult:
    """Prune ``model`` in place to ``sparsity``: importance, allocation, then the walk (ECoFLaP, arXiv 2310.02998).

    Args:
        model: any module whose forward returns a loss, or give ``loss``. In a compiled model (``torch.compile``) the
            original module is pruned.
        batches: calibration batches (a list, a ``DataLoader``, a generator), mappings of keyword arguments; moved to
            the model's device as needed. May be empty for the criterion ``magnitude`` with importance ``uniform`` or an
            allocation, and for ``global-magnitude``, which read no data.
        sparsity: fraction of the prunable weights to set to zero.
        importance: a registered name, or measured scores. Default: ``auto``, gradient norms if the model can be
            differentiated, else ``zeroth-order``; none for global criteria.
        criterion: local rule: ``admm``, ``sparsegpt``, ``wanda`` (the paper's, and the fastest), ``magnitude``; or a
            global one, which decides every layer's sparsity by itself: ``global-magnitude``, ``iterative-gradient``.
        criterion_options: of the criterion, such as ``damping`` or ``rounds``.
        pattern: ``unstructured``, or N:M such as ``2:4``, which fixes every layer's sparsity.
        compare: ``row`` or ``matrix``: where scores are compared; by default the criterion's own.
        allocation: use this one, and skip stage 1.
        search: improve the allocation by measuring the pruned model; by default if ``sensitivity`` is measured here.
        search_options: see :class:`ecoflap.search.options.SearchOptions`.
        importance_samples: stage 1 uses the first whole batches with this number of samples; None takes all.
        importance_error: stop sampling a layer when its standard error is this share of its score.
        importance_options: of the importance measure, such as ``epsilon`` or ``variant``.
        recover: afterwards fit the nonzero weights to the dense model's outputs by least squares; see
            :func:`ecoflap.recover`, also for ``recover_options``.
        loss: ``loss(model, batch)`` giving a scalar tensor.
        include, exclude, towers: patterns, see :func:`ecoflap.model.anatomy.discover`.
        tokens: which tokens enter the criterion's statistics if a language tower reads visual tokens: a name of
            :class:`ecoflap.statistics.choice.TokenChoice`. None: ``balanced`` with admm, else ``all``.
        offload_activations: where block inputs are kept between blocks: ``"cpu"`` (or True), or ``"disk"``, in a
            memory-mapped file that is removed with the process.
        compute_dtype: for half-precision weights: ``native``, their own; ``float32``, block by block; ``auto``, fp32 on
            a CPU that is slow in their own.
        max_sparsity, min_sparsity, granularity, aggregate, budget, tower_sparsity, rule, spread: of the allocation.
        workers: processes with the same model and batches that share the work, see :mod:`ecoflap.support.processes`.

    Raises:
        PartlyPruned: stage 2 failed, and there was no memory for a copy of the dense weights; names the changed layers.
        EcoflapError: says what is wrong and how to fix it. After this and any other error, the model is as before.
    """
    method = make_method(
        sparsity=sparsity, max_sparsity=max_sparsity, min_sparsity=min_sparsity, granularity=granularity,
        aggregate=aggregate, budget=budget, tower_sparsity=tower_sparsity, pattern=pattern, rule=rule, spread=spread,
        importance=importance, importance_options=importance_options, importance_samples=importance_samples,
        importance_error=importance_error, allocation=allocation, search=search, search_options=search_options,
        criterion=criterion, criterion_options=criterion_options, compare=compare, tokens=tokens,
        offload_activations=offload_activations, recover=recover, recover_options=recover_options,
    )  # fmt: skip
    model, batches = getattr(model, "_orig_mod", model), as_batches(batches, loss)
    given = allocation if allocation is not None else importance if isinstance(importance, Importance) else None
    loss = loss or default_objective(model)
    work = Work(loss, seed, progress or Silent(), workers, computed_in(model, compute_dtype, batches, loss, workers))
    return carry_out(model, batches, method, work, given, include=include, exclude=exclude, towers=towers)


def prune_to(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Mapping[str, Any]],
    *,
    criterion: str,
    criterion_options: Mapping[str, Any] | None = None,
    budget: str = "global",
    tower_sparsity: Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    compare: str | None = None,
    loss: Objective | None = None,
    offload_activations: bool | str = "none",
    tokens: str | TokenChoice | None = None,
    recover: bool = False,
    recover_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    journal: BlockJournal | None = None,
    workers: Workers = ALONE,
) -> tuple[Allocation, tuple[str, ...]]:
    """Only stage 2, for a given allocation: (allocation with achieved sparsities, layers without statistics).

    Not public: for tests and benchmarks. ``journal`` contains the work of an interrupted run.
    """
    choice = tokens if isinstance(tokens, TokenChoice) else tokens_of(criterion, tokens)
    recovery = recovery_options(recover_options) if recover else None
    options = PruningOptions(criterion, dict(criterion_options or {}), compare, choice, offload_activations, recovery)
    shares = AllocationOptions(budget=budget, tower_sparsity=tower_sparsity, pattern=pattern)
    work = Work(loss or default_objective(model), progress=progress or Silent(), workers=workers)
    found = prune_layers(model, anatomy, allocation, batches, options, shares, work, journal)
    return found.allocation, found.unreached


def recover(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    options: Mapping[str, Any] | None = None,
    loss: Objective | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
    tokens: str | TokenChoice = "all",
    offload_activations: bool | str = "none",
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> PruneResult:
    """Fit the nonzero weights of a pruned ``model``, in place, to the outputs of ``dense``; the zeros stay.

    Layer by layer, ‖X Wᵀ − X̂ Ŵᵀ‖² is minimised over all Ŵ with these zeros: W is the dense weight, X are the layer's
    inputs in the dense model and X̂ those in the model that is recovered up to this layer
    (:class:`ecoflap.pruning.recovery.FitLayer`). Layers without zeros keep their weights.

    Args:
        model: pruned from ``dense`` by any method, in any pattern; all its weights in memory.
        dense: is not changed.
        batches: calibration batches, as in :func:`prune`.
        options: ``steps`` of conjugate gradients (20) and ``damping`` (0.01).
        loss, include, exclude, towers, tokens, offload_activations, progress, workers: as in :func:`prune`.

    Raises:
        InvalidOption: the models have different shapes, differ outside of the layers, or nothing is pruned.
        EcoflapError: as in :func:`prune`; ``model`` is as before, except after PartlyPruned.
    """
    fit, choice = recovery_options(options), TokenChoice(tokens) if isinstance(tokens, str) else tokens
    model, dense = (getattr(given, "_orig_mod", given) for given in (model, dense))
    objective, batches = loss or default_objective(model), as_batches(batches, loss)
    if not len(batches):
        raise CalibrationError("no calibration batches: give at least one")
    check_choice(choice, model, batches, "pair")
    check_in_memory(model, "recover")
    with cache_disabled(model):
        anatomy = discover(model, batches[0], run=first_run(objective), include=include, exclude=exclude, towers=towers)
    pruned = weights_to_recover(dense, model, anatomy, ("the dense model", "the model"))
    part = sparse_part(anatomy, pruned, dense)
    work, offload = Work(objective, progress=progress or Silent(), workers=workers), offload_kind(offload_activations)
    with restored_on_failure(model, part.layers):
        with torch.no_grad():
            for layer in part.layers:
                stored_matrix(model, layer.name).copy_(stored_matrix(dense, layer.name))
        done = recover_layers(model, part, pruned, batches, fit, work, offload=offload, tokens=choice)
    return PruneResult(model, anatomy, None, done.allocation, done.unreached)


def inspect(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
) -> Anatomy:
    """Towers, blocks, prunable layers, and the matrices that stay dense with the reason; ``batch`` is traced."""
    model = getattr(model, "_orig_mod", model)
    with cache_disabled(model):
        placed = None if batch is None else to_device(batch, model)
        return discover(model, placed, include=include, exclude=exclude, towers=towers)
