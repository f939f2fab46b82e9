"""Manages the folder of a comparison: a run directory whose grid may grow when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ecoflap.errors import InvalidOption, ResumeMismatch
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.differences import differences
from ecoflap.run.directory import RunDirectory
from ecoflap.run.names import COMPARISON, GRID, JOURNAL, LOG, MANIFEST, RECIPE
from ecoflap.run.recipe import Recipe
from ecoflap.run.versions import versions

CELLS, IMPORTANCES, INPUTS, PAGE = "cells", "importance", "inputs.json", "compare.html"
TABLE, LINES = "compare.md", "compare.csv"
PLOTS = ("quality.png", "quality.svg", "bytes.png", "bytes.svg", "cost.png", "cost.svg")
RESULTS = (COMPARISON, PAGE, TABLE, LINES, *PLOTS)
DENSE = f"{CELLS}/dense.json"
MODELS = "models"
_AXES = ("methods", "sparsities", "seeds")


class GridDirectory(RunDirectory):
    """One comparison's files. On resume, methods, sparsities and seeds may be added; nothing else may differ."""

    what: ClassVar[str] = "comparison"
    ours: ClassVar[tuple[str, ...]] = (*RESULTS, JOURNAL, CELLS, IMPORTANCES, MODELS, INPUTS, LOG, RECIPE, MANIFEST)
    inputs: ClassVar[str] = INPUTS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._grown: Recipe | None = None

    def begin(self, recipe: Recipe, fingerprint: str, inputs: Mapping[str, str]) -> None:
        super().begin(recipe, fingerprint, inputs)
        if self._grown is not None:
            for name in RESULTS:  # of the smaller grid: removed before the recipe with the larger grid is written
                self.discard(name)
            self._write_recipe(recipe, fingerprint)

    def _is_ours(self) -> bool:
        try:
            return GRID in self.recorded()
        except InvalidOption:
            return self.manifest.exists

    def _check_same(self, recipe: Recipe) -> None:
        now = {**self.settled(recipe).to_dict(), "versions": versions()}
        before = {"values": [], **self.recorded()}
        found = [
            f"{axis}: {lost} then, not now"
            for axis in _AXES
            if (lost := ", ".join(str(v) for v in before.get(axis) or () if v not in now[axis]))
        ]
        rest = {name: value for name, value in now.items() if name not in _AXES}
        found += differences(before, rest)
        if found:
            raise ResumeMismatch(
                f"can't resume {self.path}, the result would differ: {'; '.join(found)}. "
                "Use the same options and versions (methods, sparsities and seeds may be added), or --overwrite"
            )
        if any(before.get(axis) != now[axis] for axis in _AXES):
            self._grown = recipe

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Compare known digests; add the digests of seeds that are new or had not been reached."""
        known: dict[str, Any] = self.read(INPUTS) if self.has(INPUTS) else {}
        super()._check_inputs({name: value for name, value in inputs.items() if name in known})
        if any(name not in known for name in inputs):
            self.write(INPUTS, {**known, **inputs})

    def note(self, inputs: Mapping[str, str]) -> None:
        """Store the digests of one seed's inputs, or compare them with the stored ones.

        Raises:
            ResumeMismatch: they were different when the comparison began.
        """
        self._check_inputs(inputs)

    def _check_inputs_are_elsewhere(self, recipe: Recipe) -> None:
        super()._check_inputs_are_elsewhere(recipe)
        if isinstance(recipe, Grid):
            for method in recipe.known_methods():
                super()._check_inputs_are_elsewhere(recipe.model_copy(update={"importance": method.importance}))

    @property
    def complete(self) -> bool:
        """Remove the journal once all files are written."""
        return self.resumed and self._grown is None and self.has(COMPARISON) and not self.has(JOURNAL)
