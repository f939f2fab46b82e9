"""Computes the scores of OWL and DLP from |W|·‖X‖₂ in one pass of the dense model.

OWL: the score of a block is its share of outliers, which are products far above the mean. DLP: a block with a high
median product is less important.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.base import ImportanceMeasure, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.model.offload import read_weight
from ecoflap.model.parts import Layer
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.support.ranges import check_positive, check_range
from ecoflap.support.registry import unknown

SCOPES = ("block", "layer")


def check_scope(scope: str) -> None:
    """Raises UnknownName for an unknown scope."""
    if scope not in SCOPES:
        raise unknown("scope", scope, list(SCOPES))


def one_estimate_per_layer(
    context: ProbeContext,
    scope: str,
    reduce: Callable[[Tensor], float],
    scale: Callable[[Mapping[str, float]], Mapping[str, float]],
) -> Iterator[Estimate]:
    """One estimate per layer, all with batch number 0 (for the pass over all batches), without known ones.

    Args:
        scope: "block" pools the products of all matrices of a block, which all get its number; "layer" takes each
            matrix by itself.
        reduce: gives a number from pooled products |W_ij|·‖X_j‖₂, flat fp32.
        scale: gives scores from the numbers of all pools; a higher score keeps more.

    Layers that no token reached are left out of their block's pool. A pool that no token reached gets the lowest score
    of the others (0 if there is none), so that it does not widen the scale.

    Raises:
        NonFiniteLoss: a weight or an input is NaN or infinite; names the layer or block.
    """
    if all((layer.name, 0, 0) in context.done for layer in context.layers):
        return
    pool_of: dict[str, str] = {}
    found: dict[str, float] = {}
    norms = context.input_norms()
    for block in context.anatomy.blocks:
        for pool, layers in (
            [(block.name, block.layers)] if scope == "block" else [(x.name, (x,)) for x in block.layers]
        ):
            pool_of |= {layer.name: pool for layer in layers}
            parts = [_products(context, layer, norms.get(layer.name)) for layer in layers]
            reached = [part for part in parts if part is not None]
            if reached:
                found[pool] = reduce(torch.cat(reached))
    scores = scale(found)
    lowest = min(scores.values(), default=0.0)
    for layer in context.layers:
        if (layer.name, 0, 0) not in context.done:
            yield Estimate(layer.name, 0, 0, scores.get(pool_of[layer.name], lowest))


def _products(context: ProbeContext, layer: Layer, statistics: InputStatistics | None) -> Tensor | None:
    if statistics is None:
        return None
    weight = read_weight(context.model, layer.name)
    magnitude = (weight.t() if layer.transposed else weight).float().abs()
    if not torch.isfinite(magnitude).all():
        raise NonFiniteLoss(f"the weight {layer.name} holds NaN or infinite values: the checkpoint is damaged")
    return (magnitude * statistics.norm.to(magnitude.device)).flatten()


@dataclass(frozen=True)
class Owl(ImportanceMeasure):
    """The layerwise outlier distribution of Yin et al., ICML 2024, arXiv 2310.05175, section 3: the share of the
    products A_ij = |W_ij|·‖X_j‖₂ above M times their mean, with ‖X_j‖₂ over all calibration tokens of the dense model.

    A block with a higher share keeps more: the rule ``linear`` maps the shares to sparsities in a band of width 2λ
    whose mean is the target.

    Attributes:
        multiple: M; the paper's choice is 5 (and 7 for some models).
        scope: ``block`` takes mean and count over all matrices of a transformer block, as published; ``layer`` over
            each matrix, for granularity ``layer``.
        spread: λ, from 0 to 1; the published choice is 0.08.
    """

    multiple: float = 5.0
    scope: str = "block"
    spread: float = 0.08
    rule: ClassVar[str] = "linear"
    noisy: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("multiple", self.multiple)
        check_scope(self.scope)
        check_range("spread", self.spread, 0, 1)

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value per layer, its block's; after one pass of the dense model over the batches."""
        return one_estimate_per_layer(
            context, self.scope, lambda products: outlier_share(products, self.multiple), dict
        )


def outlier_share(products: Tensor, multiple: float) -> float:
    """Share of the entries of ``products`` (flat, non-negative) that are above ``multiple`` times their mean."""
    return int((products > multiple * products.mean()).sum()) / products.numel()


@dataclass(frozen=True)
class Dlp(ImportanceMeasure):
    """Chen et al., "DLP", ICML 2025, arXiv 2505.23807, section 3: U_l is the median of |W_ij|·‖X_j‖₂ in block l, ‖X_j‖₂
    over all calibration tokens of the dense model; the score is 1 − U_l / Σ_m U_m.

    In the paper a block with a high U is unimportant and keeps less. The rule ``linear`` maps scores to sparsities in a
    band of width 2α whose mean is the target. Medians of towers with different numbers of tokens or scales of weights
    can't be compared: with several towers, use ``budget="tower"``.

    Attributes:
        scope: ``block`` takes the median over all matrices of a transformer block, as published; ``layer`` over each
            matrix, for granularity ``layer``.
        spread: α, from 0 to 1; the published choice is 0.15.
    """

    scope: str = "block"
    spread: float = 0.15
    rule: ClassVar[str] = "linear"
    noisy: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_range("spread", self.spread, 0, 1)

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value per layer, its block's; after one pass of the dense model over the batches."""
        return one_estimate_per_layer(context, self.scope, lower_median, relative_importance)


def lower_median(products: Tensor) -> float:
    """The median of a flat tensor; for an even number the lower of the two middle values, as in the published code."""
    return float(products.median())


def relative_importance(medians: Mapping[str, float]) -> Mapping[str, float]:
    """1 − U / ΣU for each; 1 where all are zero."""
    whole = math.fsum(medians.values())
    return {name: 1 - (median / whole if whole else 0.0) for name, median in medians.items()}
