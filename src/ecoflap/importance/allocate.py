"""Turns the scores of stage 1 into an exact number of zeros for each layer. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.allocation.allocate import allocate as allocate_sizes
from ecoflap.allocation.curves import Curve
from ecoflap.allocation.groups import LayerSize
from ecoflap.allocation.parts import Allocation
from ecoflap.importance.scores import Importance, Score, check_granularity
from ecoflap.model.parts import Anatomy, Layer


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
    """Turn scores into an exact number of zeros for each layer; options as in :func:`ecoflap.allocation.allocate`.

    The importance ``uniform`` gives every layer the same sparsity. The default rule and spread are those of the
    importance.

    Raises:
        InvalidOption, InfeasibleAllocation, UnknownName: as there; or the scores are of whole blocks and
            ``granularity`` is finer.
    """
    options = AllocationOptions(
        sparsity, max_sparsity, min_sparsity, granularity, aggregate, budget, tower_sparsity, pattern, rule, spread
    )
    return allocate_scores(importance, options)


def allocate_scores(importance: Importance, options: AllocationOptions) -> Allocation:
    """:func:`allocate` with its options as one object."""
    own = str(importance.settings.get("rule", "proportional"))
    spread = options.spread
    if spread is None and options.rule in (None, own):
        spread = importance.settings.get("spread")
    check_granularity(importance.settings, options.granularity)
    allocation = allocate_sizes(
        [_size(layer, importance.scores[layer.name].score) for layer in importance.layers],
        uniform=importance.method == "uniform",
        data=importance.curves,
        **{**options.to_dict(), "rule": options.rule or own, "spread": spread},
    )
    parameters = importance.settings.get("model_parameters")
    return replace(allocation, model_parameters=parameters) if isinstance(parameters, int) else allocation


def flat(anatomy: Anatomy, rule: str = "proportional") -> Importance:
    """Equal scores for all layers, to check before stage 1 whether an allocation is feasible."""
    scores = {layer.name: Score(1.0, 0.0, 1) for layer in anatomy.layers}
    curves = {block.name: Curve((1.0,), (1.0,)) for block in anatomy.blocks if block.layers}
    return Importance("flat", {"rule": rule}, anatomy.layers, scores, curves)


def sizes_of(layers: Iterable[Layer]) -> list[LayerSize]:
    """The layers without scores."""
    return [_size(layer, 0.0) for layer in layers]


def _size(layer: Layer, score: float) -> LayerSize:
    return LayerSize(
        layer.name, layer.tower, layer.block, layer.numel, score, layer.modality, layer.shape, layer.expert
    )
