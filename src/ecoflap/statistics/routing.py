"""Counts the tokens that routers send to each expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ecoflap.model.block_runner import Run
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics
from ecoflap.support.workers import ALONE, Workers

Routing = Mapping[str, Mapping[str, int]]
"""Number of tokens by path of the mixture and path of the expert, in the order of the experts."""


def by_mixture(layers: Iterable[Layer], tokens: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The experts' tokens by mixture, without lists of modules of which at most one runs.

    Args:
        tokens: number of real tokens by path of the expert; 0 if it is missing.
    """
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.expert:
            found.setdefault(layer.mixture, {})[layer.expert] = tokens.get(layer.expert, 0)
    return {path: counts for path, counts in found.items() if sum(count > 0 for count in counts.values()) > 1}


def routing(model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], run: Run, workers: Workers = ALONE) -> Routing:
    """Tokens of each expert in one pass of the dense model over the batches; padding does not count.

    Args:
        run: runs the model on a batch.
    """
    without = {block.name for block in anatomy.blocks if not any(layer.expert for layer in block.layers)}
    tokens: dict[str, int] = {}
    own = TokenChoice(experts=0)
    for block, found in dense_statistics(model, anatomy, batches, run, skip=without, tokens=own, workers=workers):
        for layer in block.layers:
            statistic = found[layer.name]
            if layer.expert and statistic is not None:
                tokens[layer.expert] = max(tokens.get(layer.expert, 0), statistic.tokens)
    return by_mixture(anatomy.layers, tokens)
