"""The Python interface: the two stages on any model and batches, without recipe, files or command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ecoflap.allocation import Allocation, LayerSize
from ecoflap.allocation import allocate as allocate_sizes
from ecoflap.allocation.curves import Curve
from ecoflap.allocation.fits import check_allocation, check_same_layers
from ecoflap.allocation.groups import make_pools
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.importance.registry import own_rule
from ecoflap.importance.scores import Importance, Score, check_granularity
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import nn

    from ecoflap.data.objectives import Objective
    from ecoflap.pruning.walk import BlockJournal
    from ecoflap.statistics.choice import TokenChoice
    from ecoflap.support.progress import Progress


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune` did.

    Attributes:
        model: the model that was given, pruned in place.
        anatomy: its towers, blocks and layers, and what stayed dense.
        importance: scores of stage 1; None if an allocation was given.
        allocation: target and achieved sparsity of each layer.
        unreached: layers that no calibration token reached, pruned by magnitude.
    """

    model: nn.Module
    anatomy: Anatomy
    importance: Importance | None
    allocation: Allocation
    unreached: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the prunable weights."""
        return (
            sum((row.achieved or 0.0) * row.weights for row in self.allocation.layers) / self.allocation.total_weights
        )


def allocate(
    importance: Importance,
    sparsity: float,
    *,
    max_sparsity: float | None = None,
    min_sparsity: float = 0.0,
    granularity: str = "block",
    aggregate: str | None = None,
    budget: str = "global",
    tower_sparsity: Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    rule: str | None = None,
    spread: float | None = None,
) -> Allocation:
    """Scores to an exact number of zeros for each layer; see :func:`ecoflap.allocation.allocate` for the options.

    The importance ``uniform`` gives every layer the same sparsity. Without a rule, that which the importance was made
    for is taken, with its spread.

    Raises:
        InvalidOption, InfeasibleAllocation, UnknownName: as there; or the scores are of whole blocks, and
            ``granularity`` asks for single layers.
    """
    own = str(importance.settings.get("rule", "proportional"))
    if spread is None and rule in (None, own):
        spread = importance.settings.get("spread")
    check_granularity(importance.settings, granularity)
    allocation = allocate_sizes(
        [_size(layer, importance.scores[layer.name].score) for layer in importance.layers],
        sparsity=sparsity,
        max_sparsity=max_sparsity,
        min_sparsity=min_sparsity,
        granularity=granularity,
        aggregate=aggregate,
        budget=budget,
        tower_sparsity=tower_sparsity,
        uniform=importance.method == "uniform",
        pattern=pattern,
        rule=rule or own,
        spread=spread,
        data=importance.curves,
    )
    parameters = importance.settings.get("model_parameters")
    return replace(allocation, model_parameters=parameters) if isinstance(parameters, int) else allocation


def _size(layer: Layer, score: float) -> LayerSize:
    return LayerSize(layer.name, layer.tower, layer.block, layer.numel, score, layer.modality, layer.shape)


def prune(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    sparsity: float = 0.5,
    *,
    importance: str | Importance | None = None,
    criterion: str = "wanda",
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
    loss: Objective | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
    seed: int = 0,
    tokens: str | TokenChoice = "all",
    offload_activations: bool | str = "none",
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> PruneResult:
    """Prune ``model`` in place to ``sparsity``: importance, allocation, then the walk (ECoFLaP, arXiv 2310.02998).

    Args:
        model: any module whose forward returns a loss, or give ``loss``.
        batches: calibration batches, mappings of keyword arguments; moved to the model's device as needed. May be
            empty for the criterion ``magnitude`` with importance ``uniform`` or an allocation, and for
            ``global-magnitude``, which read no data.
        sparsity: fraction of the prunable weights to set to zero.
        importance: a registered name, or scores measured before. Default: ``zeroth-order``; none for global criteria.
        criterion: local rule: ``wanda``, ``sparsegpt``, ``magnitude``; or a global one, which decides every layer's
            sparsity by itself: ``global-magnitude``, ``iterative-gradient``.
        criterion_options: of the criterion, such as ``damping`` or ``rounds``.
        pattern: ``unstructured``, or N:M such as ``2:4`` (with ``importance="uniform"``).
        compare: ``row`` or ``matrix``: where scores are compared; by default the criterion's own.
        allocation: use this one, and skip stage 1.
        search: improve the allocation by measuring the pruned model; by default where ``sensitivity`` is measured here.
        search_options: see :class:`ecoflap.search.options.SearchOptions`.
        importance_samples: stage 1 uses the first whole batches with so many samples; None takes all.
        importance_error: sample a layer only until its standard error is this share of its score.
        importance_options: of the importance measure, such as ``epsilon`` or ``variant``.
        loss: ``loss(model, batch)`` giving a scalar tensor.
        include, exclude, towers: patterns, see :func:`ecoflap.model.anatomy.discover`.
        tokens: what enters the criterion's statistics where a language tower reads visual tokens, too: ``all``,
            ``text``, ``text+top``, ``text+attended`` or ``atv``, see :class:`ecoflap.statistics.tokens.TokenChoice`.
        offload_activations: keep block inputs elsewhere between blocks: ``"cpu"`` (or True), or ``"disk"``, in a
            memory-mapped file that goes with the process.
        max_sparsity, min_sparsity, granularity, aggregate, budget, tower_sparsity, rule, spread: of the allocation.
        workers: processes that have model and batches alike and share the work, see :mod:`ecoflap.support.processes`.

    Raises:
        EcoflapError: says what is wrong and how to mend it; the model is untouched unless the walk had begun.
    """
    from ecoflap.data.batches import first_samples
    from ecoflap.data.objectives import default_objective, on_device
    from ecoflap.importance.measure import make_measure, measure_importance
    from ecoflap.importance.offloaded import check_model
    from ecoflap.importance.stopping import stopping_of
    from ecoflap.model.anatomy import discover
    from ecoflap.model.patching import cache_disabled
    from ecoflap.pruning.criteria import make_criterion
    from ecoflap.pruning.registry import is_global, reads_data, refuse_with_global
    from ecoflap.search.search import search_allocation
    from ecoflap.search.search import search_options as checked_search_options
    from ecoflap.statistics.choice import TokenChoice
    from ecoflap.statistics.tokens import check_choice

    choice = TokenChoice(tokens) if isinstance(tokens, str) else tokens
    check_choice(choice, model, batches, getattr(make_criterion(criterion, criterion_options), "statistics", "none"))
    if is_global(criterion):
        refuse_with_global(
            criterion,
            {
                "importance": importance.method if isinstance(importance, Importance) else importance,
                "importance_options": importance_options,
                "allocation": None if allocation is None else "that is given",
                "pattern": pattern,
                "compare": compare,
                "max_sparsity": max_sparsity,
                "min_sparsity": min_sparsity,
                "granularity": granularity,
                "aggregate": aggregate,
                "rule": rule,
                "spread": spread,
                "search": search,
                "search_options": search_options,
            },
        )
        importance, max_sparsity = "uniform", 1.0
    elif importance is None:
        importance = "zeroth-order"
    given = allocation is not None or not isinstance(importance, str)
    searched = importance == "sensitivity" if search is None else search
    check_model(model, None if given else str(importance), criterion, searched)
    if search and allocation is not None:
        raise InvalidOption("search: an allocation is given, so there is nothing to search for")
    options = checked_search_options(search_options)
    shares: dict[str, Any] = {
        "sparsity": sparsity,
        "max_sparsity": max_sparsity,
        "min_sparsity": min_sparsity,
        "granularity": granularity,
        "aggregate": aggregate,
        "budget": budget,
        "tower_sparsity": tower_sparsity,
        "pattern": pattern,
        "rule": rule,
        "spread": spread,
    }
    measured = allocation is None and not isinstance(importance, Importance) and importance != "uniform"
    if not len(batches) and (measured or reads_data(criterion)):
        raise CalibrationError("no calibration batches: give at least one")
    if measured:  # a wrong option is told now, not after the forward passes
        made = make_measure(str(importance), dict(importance_options or {}))
        check_granularity(vars(made), granularity)
        stopping_of(str(importance), made, importance_error)
        first_samples(batches, importance_samples)
    objective = loss or default_objective(model)
    first = batches[0] if len(batches) else None
    with cache_disabled(model):
        anatomy = discover(model, first, include=include, exclude=exclude, towers=towers, run=on_device(objective))
    scores: Importance | None = None
    if allocation is None:
        if importance == "uniform":
            scores = Importance.uniform(anatomy.layers, anatomy.total_parameters)
        elif isinstance(importance, Importance):
            check_same_layers(anatomy, importance)
            scores = importance
        else:
            allocate(flat(anatomy, own_rule(str(importance))), **shares)
            scores = measure_importance(
                model,
                batches,
                importance,
                samples=importance_samples,
                error=importance_error,
                seed=seed,
                loss=objective,
                anatomy=anatomy,
                progress=progress,
                workers=workers,
                **dict(importance_options or {}),
            )
        allocation = allocate(scores, **shares)
        if importance == "sensitivity" if search is None else search:
            allocation = search_allocation(
                model,
                anatomy,
                allocation,
                batches,
                criterion=criterion,
                criterion_options=criterion_options,
                compare=compare,
                loss=objective,
                shares=shares,
                options=options,
                tokens=choice,
                seed=seed,
                progress=progress,
                workers=workers,
            ).recorded
    check_allocation(anatomy, allocation, pattern)
    result = prune_to(
        model,
        anatomy,
        allocation,
        batches,
        criterion=criterion,
        criterion_options=criterion_options,
        budget=budget,
        tower_sparsity=tower_sparsity,
        pattern=pattern,
        compare=compare,
        loss=objective,
        offload_activations=offload_activations,
        tokens=choice,
        progress=progress,
        workers=workers,
    )
    return PruneResult(model, anatomy, scores, result[0], result[1])


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
    tokens: str | TokenChoice = "all",
    progress: Progress | None = None,
    journal: BlockJournal | None = None,
    workers: Workers = ALONE,
) -> tuple[Allocation, tuple[str, ...]]:
    """Stage 2 alone, for a given allocation: (allocation with achieved sparsities, layers without statistics).

    Args:
        allocation: of a global criterion only the sums count, one for each budget that ``budget`` and
            ``tower_sparsity`` make; the allocation that is returned then has the zeros that each layer was given.
        criterion, criterion_options: as in :func:`prune`.
        budget, tower_sparsity: as in :func:`allocate`; not looked at by local criteria.
        journal: what an interrupted run has done, and where more goes; the same for all workers.
        workers: those who have model and batches alike; a global criterion is computed by all of them.
    """
    from ecoflap.allocation.patterns import parse_pattern, with_default
    from ecoflap.data.objectives import default_objective, on_device
    from ecoflap.importance.offloaded import check_model
    from ecoflap.model.activation_store import offload_kind
    from ecoflap.pruning.criteria import GlobalCriterion, make_criterion
    from ecoflap.pruning.registry import refuse_with_global
    from ecoflap.pruning.walk import walk
    from ecoflap.pruning.whole_model import prune_globally
    from ecoflap.statistics.choice import TokenChoice
    from ecoflap.statistics.tokens import check_choice

    rule = make_criterion(criterion, criterion_options)
    check_model(model, None, criterion)
    offload = offload_kind(offload_activations)
    choice = TokenChoice(tokens) if isinstance(tokens, str) else tokens
    objective = on_device(loss or default_objective(model))
    if isinstance(rule, GlobalCriterion):
        refuse_with_global(criterion, {"pattern": pattern, "compare": compare})
        check_choice(choice, model, batches, "none")
        result = prune_globally(
            model,
            anatomy,
            allocation,
            _budgets(anatomy, budget, tower_sparsity or {}),
            batches,
            rule,
            objective=objective,
            offload=offload != "none",
            progress=progress,
            journal=journal,
        )
        return result.allocation, result.unreached
    result = walk(
        model,
        anatomy,
        allocation,
        batches,
        rule,
        with_default(parse_pattern(pattern, compare), rule.default_compare),
        run=objective,
        offload=offload,
        tokens=choice,
        progress=progress,
        journal=journal,
        workers=workers,
    )
    return result.allocation, result.unreached


def _budgets(anatomy: Anatomy, budget: str, tower_sparsity: Mapping[str, float]) -> dict[str, str]:
    """Layer to the name of the budget that it shares."""
    pools = make_pools([_size(layer, 0.0) for layer in anatomy.layers], Fraction(0), budget, tower_sparsity)
    return {layer.name: pool.name for pool in pools for layer in pool.layers}


def flat(anatomy: Anatomy, rule: str = "proportional") -> Importance:
    """Every layer as important as any other: to learn at once, before stage 1, whether an allocation is feasible."""
    scores = {layer.name: Score(1.0, 0.0, 1) for layer in anatomy.layers}
    curves = {block.name: Curve((1.0,), (1.0,)) for block in anatomy.blocks if block.layers}
    return Importance("flat", {"rule": rule}, anatomy.layers, scores, curves)


def inspect(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
) -> Anatomy:
    """Towers, blocks, prunable layers, and what stays dense with the reason; ``batch`` lets it watch a forward."""
    from ecoflap.data.model_facts import to_device
    from ecoflap.model.anatomy import discover
    from ecoflap.model.patching import cache_disabled

    with cache_disabled(model):
        placed = None if batch is None else to_device(batch, model)
        return discover(model, placed, include=include, exclude=exclude, towers=towers)
