"""Shares importance scores and searches between the cells of a grid, in files, so that a resumed grid finds them.

Criteria that remove weights in the same order share a search.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict

from ecoflap.allocation import Allocation
from ecoflap.errors import EcoflapError, InvalidOption, StorageError
from ecoflap.importance.registry import IMPORTANCES as MEASURES
from ecoflap.importance.scores import Importance
from ecoflap.pruning.criteria import make_criterion
from ecoflap.run.checks import is_measured
from ecoflap.run.compare.folder import IMPORTANCES, GridDirectory
from ecoflap.run.compare.methods import SHARED
from ecoflap.run.journal import EstimateFile, SearchFile
from ecoflap.run.names import JOURNAL
from ecoflap.run.pipeline import allocation_for, importance_for
from ecoflap.run.prepare import Prepared
from ecoflap.run.provenance import Usage, measured
from ecoflap.run.recipe import Recipe
from ecoflap.search.search import search_options
from ecoflap.support.formats import duration
from ecoflap.support.progress import Progress
from ecoflap.support.reading import checked

_log = logging.getLogger("ecoflap")

# Fields that stage 1 does not use. A measure that reads some declares them: ``reads = ("criterion", "pattern")``.
_AFTER_STAGE_1 = frozenset((
    "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity", "rule",
    "spread", "search", "search_options", "allocation",
    "criterion", "criterion_options", "pattern", "compare", "offload_activations", "recover", "recover_options",
    "expert_tokens",
))  # fmt: skip

# Fields of later versions: left out if they are None, so that files of older grids keep their names.
_NEWER = frozenset(("importance_error", "expert_tokens"))
# Stage 1 does not read these, but their defaults are part of the file names of older grids.
_UNREAD = {"tokens": "all", "top_tokens": None}


class Took(BaseModel):
    """Seconds and peak memory of a measurement."""

    model_config = ConfigDict(frozen=True)

    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    peak_cuda_bytes: int | None = None

    @classmethod
    def of(cls, usage: Usage) -> Took:
        return cls(
            seconds=usage.seconds, peak_memory_bytes=usage.peak_memory_bytes, peak_cuda_bytes=usage.peak_cuda_bytes
        )


def key_of(recipe: Recipe) -> str:
    """A file name that depends on everything that changes the scores: measure, options, samples, seed."""
    reads = MEASURES.fact(recipe.importance, "reads", ())
    decides = {
        name: value
        for name, value in recipe.to_dict().items()
        if name not in SHARED
        and (name not in _AFTER_STAGE_1 or name in reads)
        and (value is not None or name not in _NEWER)
    }
    decides |= _UNREAD
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{recipe.importance}-seed{recipe.seed}-{digest[:8]}"


class SharedScores:
    """The importances of a grid, measured when first asked for."""

    def __init__(self, folder: GridDirectory, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._failed: dict[str, EcoflapError] = {}

    def of(self, plan: Prepared) -> tuple[Importance, Took]:
        """The scores that ``plan`` starts from, and the time and memory of their measurement (zero if there was none).

        Raises:
            EcoflapError: they can't be measured; every cell that needs them gets the same error.
        """
        if plan.importance is not None or not is_measured(plan.recipe):
            return importance_for(plan, self._progress), Took()
        key = key_of(plan.recipe)
        name = f"{IMPORTANCES}/{key}.json"
        if key in self._failed:
            raise self._failed[key]
        if not self._folder.whole(name):
            try:
                self._measure(plan, key, name)
            except StorageError:
                raise
            except EcoflapError as error:
                self._failed[key] = error
                raise
        data = self._folder.read(name)
        return Importance.from_json(data, str(self._folder.path / name)), took_of(data, name)

    def _measure(self, plan: Prepared, key: str, name: str) -> None:
        journal = EstimateFile(self._folder.path / JOURNAL / f"{key}.jsonl")
        usages: list[Usage] = []
        _log.info("%s: begins", key)
        try:
            with measured("importance", usages):
                importance = importance_for(plan, self._progress, journal)
        finally:
            journal.close()
        (usage,) = usages
        self._folder.write(name, {**importance.to_json(), "took": Took.of(usage).model_dump()})
        _log.info("%s: done in %s", key, duration(usage.seconds))


def took_of(data: Any, name: str) -> Took:
    """The time and memory noted in a kept file. Raises InvalidOption if the file is damaged."""
    if not isinstance(data, dict):
        raise InvalidOption(f"{name} holds no object: remove it, and --resume measures it again")
    found: Took = checked(data.get("took", {}), Took, name)
    return found


# Fields that the search does not use, or (the criterion) that enter it only by the order of removal.
_AFTER_SEARCH = frozenset((
    "criterion", "criterion_options", "pattern", "offload_activations", "recover", "recover_options",
    "expert_tokens",
))  # fmt: skip


def order_of(recipe: Recipe) -> str:
    """The name of the order in which the criterion removes weights: criteria with the same order share a search."""
    needs = str(getattr(make_criterion(recipe.criterion), "statistics", "none"))
    if needs in ("gram", "pair") and search_options(recipe.search_options).weights == "own":
        return f"{recipe.criterion} {sorted(recipe.criterion_options.items())}"
    return "none" if needs == "none" else "norm"


def search_key(recipe: Recipe) -> str:
    """A file name that depends on everything that changes the allocation."""
    decides = {name: value for name, value in recipe.to_dict().items() if name not in SHARED | _AFTER_SEARCH}
    decides["statistics"] = order_of(recipe)
    decides["tokens"] = recipe.token_choice().name
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"search-{recipe.importance.replace('/', '_')}-{recipe.sparsity:g}-seed{recipe.seed}-{digest[:8]}"


def allocated(
    plan: Prepared, importance: Importance, folder: GridDirectory, progress: Progress
) -> tuple[Allocation, Usage]:
    """The allocation of a cell, and the time and memory that it took; only allocations of a search are kept.

    Raises:
        EcoflapError: as :func:`ecoflap.run.pipeline.allocation_for`.
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
        _log.info("%s: done in %s", key, duration(took.seconds))
    data = folder.read(name)
    took = took_of(data, name)
    return Allocation.from_json(data), Usage(
        "allocation", took.seconds, took.peak_memory_bytes or 0, took.peak_cuda_bytes
    )
