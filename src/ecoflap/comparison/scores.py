"""Stage 1 of a grid: each measure once a seed, kept as a file, for all sparsities and criteria."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ecoflap.comparison.folder import IMPORTANCES, GridDirectory
from ecoflap.comparison.methods import SHARED
from ecoflap.errors import EcoflapError, InvalidOption, StorageError
from ecoflap.importance.names import IMPORTANCES as MEASURES
from ecoflap.importance.scores import Importance
from ecoflap.journal import EstimateFile
from ecoflap.prepare import Prepared, is_measured
from ecoflap.progress import Progress
from ecoflap.recipe import Recipe
from ecoflap.resources import Usage, measured
from ecoflap.run import JOURNAL
from ecoflap.stages import importance_for

_log = logging.getLogger("ecoflap")
# What is decided after stage 1. A measure that reads some of it says so: ``reads = ("criterion", "pattern")``.
_LATER = frozenset((
    "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity", "rule",
    "spread", "search", "search_options", "allocation",
    "criterion", "criterion_options", "pattern", "compare", "offload_activations",
))  # fmt: skip
# Fields that came later: left out where they say nothing, or files of older grids would get other names.
_NEWER = frozenset(("importance_error",))
# Stage 1 reads none of these, but older grids have their defaults in the names of files.
_UNREAD = {"tokens": "all", "top_tokens": None}


class Took(BaseModel):
    """What a measurement took: seconds, and the process's memory at its peak."""

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
    """A file's name that tells apart what gives other scores: measure, options, samples, seed."""
    reads = getattr(MEASURES.get(recipe.importance), "reads", ())
    decides = {
        name: value
        for name, value in recipe.to_dict().items()
        if name not in SHARED and (name not in _LATER or name in reads) and (value is not None or name not in _NEWER)
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
        """The scores that ``plan`` starts from, and what their measurement took (nothing if there was none).

        Raises:
            EcoflapError: they can't be measured; the same again for every cell that wants them.
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
        _log.info("%s: done in %.1f s", key, usage.seconds)


def took_of(data: Any, name: str) -> Took:
    """What a kept file says that it took. Raises InvalidOption where the file is damaged."""
    try:
        return Took.model_validate(data.get("took", {}))
    except ValidationError as error:
        raise InvalidOption(f"{name} is damaged: remove it, and --resume measures it again") from error
