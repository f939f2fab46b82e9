"""Allocations that were searched for: criteria that remove weights in one order share them, and a kill keeps them."""

from __future__ import annotations

import hashlib
import json
import logging

from ecoflap.allocation import Allocation
from ecoflap.comparison.folder import IMPORTANCES, GridDirectory
from ecoflap.comparison.methods import SHARED
from ecoflap.comparison.scores import Took, took_of
from ecoflap.importance.scores import Importance
from ecoflap.journal import SearchFile
from ecoflap.prepare import Prepared
from ecoflap.progress import Progress
from ecoflap.pruning.criteria import make_criterion
from ecoflap.recipe import Recipe
from ecoflap.resources import Usage, measured
from ecoflap.run import JOURNAL
from ecoflap.search.start import search_options
from ecoflap.stages import allocation_for

_log = logging.getLogger("ecoflap")
# What is decided after the search, or (the criterion) enters it by its order alone.
_LATER = frozenset(("criterion", "criterion_options", "pattern", "offload_activations"))


def order_of(recipe: Recipe) -> str:
    """What of the criterion enters the search: criteria of one order share what is found."""
    needs = str(getattr(make_criterion(recipe.criterion), "statistics", "none"))
    if needs == "gram" and search_options(recipe.search_options).weights == "own":
        return f"{recipe.criterion} {sorted(recipe.criterion_options.items())}"
    return "none" if needs == "none" else "norm"


def search_key(recipe: Recipe) -> str:
    """A file's name that tells apart what gives other allocations."""
    decides = {name: value for name, value in recipe.to_dict().items() if name not in SHARED | _LATER}
    decides["statistics"] = order_of(recipe)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"search-{recipe.importance.replace('/', '_')}-{recipe.sparsity:g}-seed{recipe.seed}-{digest[:8]}"


def allocated(
    plan: Prepared, importance: Importance, folder: GridDirectory, progress: Progress
) -> tuple[Allocation, Usage]:
    """The allocation of a cell, and what it took when it was made; only those that are searched for are kept.

    Raises:
        EcoflapError: as :func:`ecoflap.stages.allocation_for`.
    """
    usages: list[Usage] = []
    if not plan.recipe.search:
        with measured("allocation", usages):
            allocation = allocation_for(plan, importance, progress)
        return allocation, usages[0]
    key = search_key(plan.recipe)
    name = f"{IMPORTANCES}/{key}.json"
    if not folder.whole(name):
        with measured("allocation", usages):
            found = allocation_for(plan, importance, progress, SearchFile(folder.path / JOURNAL / f"{key}.json"))
        took = Took.of(usages[0])
        folder.write(name, {**found.to_json(), "took": took.model_dump()})
        _log.info("%s: done in %.1f s", key, took.seconds)
    data = folder.read(name)
    took = took_of(data, name)
    return Allocation.from_json(data), Usage(
        "allocation", took.seconds, took.peak_memory_bytes or 0, took.peak_cuda_bytes
    )
