"""ECoFLaP: coarse-to-fine layer-wise pruning of vision-language models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecoflap.analysis.perform import analyse
    from ecoflap.api import PruneResult, allocate, inspect, prune
    from ecoflap.card import write_model_card
    from ecoflap.comparison.entry import compare
    from ecoflap.hub import push
    from ecoflap.importance.measure import measure_importance
    from ecoflap.importance.scores import Importance, Score
    from ecoflap.network.checkpoint import load, save
    from ecoflap.recipe import Recipe

__all__ = [
    "Importance",
    "PruneResult",
    "Recipe",
    "Score",
    "allocate",
    "analyse",
    "compare",
    "inspect",
    "load",
    "measure_importance",
    "prune",
    "push",
    "save",
    "write_model_card",
]

try:
    __version__ = version("ecoflap")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

# Imported when first used: what needs no model (the allocation, --help) must not wait for torch.
_HOMES = {
    "Importance": "ecoflap.importance.scores",
    "PruneResult": "ecoflap.api",
    "Recipe": "ecoflap.recipe",
    "Score": "ecoflap.importance.scores",
    "allocate": "ecoflap.api",
    "analyse": "ecoflap.analysis.perform",
    "compare": "ecoflap.comparison.entry",
    "inspect": "ecoflap.api",
    "load": "ecoflap.network.checkpoint",
    "measure_importance": "ecoflap.importance.measure",
    "prune": "ecoflap.api",
    "push": "ecoflap.hub",
    "save": "ecoflap.network.save",
    "write_model_card": "ecoflap.card",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ecoflap' has no attribute '{name}'")
