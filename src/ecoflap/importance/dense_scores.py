"""What OWL and DLP share: one dense pass, then one number for each block, or for each matrix, from |W|·‖X‖₂."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.network.offload import read_weight
from ecoflap.network.parts import Layer
from ecoflap.registry import unknown
from ecoflap.statistics.inputs import InputStatistics

SCOPES = ("block", "layer")


def check_scope(scope: str) -> None:
    """Raises UnknownName for a scope that there is not."""
    if scope not in SCOPES:
        raise unknown("scope", scope, list(SCOPES))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidOption for a number outside of ``low`` to ``high``."""
    if not low <= value <= high:
        raise InvalidOption(f"{name} must be from {low:g} to {high:g}, not {value}")


def one_each(
    context: ProbeContext,
    scope: str,
    reduce: Callable[[Tensor], float],
    scale: Callable[[Mapping[str, float]], Mapping[str, float]],
) -> Iterator[Estimate]:
    """One estimate a layer, all on batch 0 (it stands for the pass over all batches), without those that are known.

    Args:
        scope: "block" pools the products of all matrices of a block, which all get its number; "layer" takes each
            matrix by itself.
        reduce: pooled products |W_ij|·‖X_j‖₂, flat fp32, to a number.
        scale: the numbers of all pools by name to scores, higher meaning: keep more.

    Layers that no token reached are left out of their block's pool; where a whole pool was not reached, it gets the
    lowest score of the others (0 if there is none): nothing says that it matters, and it must not stretch the scale.

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
