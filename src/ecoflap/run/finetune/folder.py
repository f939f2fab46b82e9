"""The folder of a fine-tuning: a run directory with the trainer's checkpoints in its journal."""

from __future__ import annotations

from typing import ClassVar

from ecoflap.errors import InvalidOption
from ecoflap.run.directory import RunDirectory
from ecoflap.run.names import CHECKPOINTS, GRID, JOURNAL, LOG, MANIFEST, METRICS, MODEL, RECIPE, REPORT, TRAIN

TRAINING = f"{JOURNAL}/training.json"  # the training's outcome, written after its model


class FinetuneDirectory(RunDirectory):
    """One fine-tuning's files."""

    what: ClassVar[str] = "fine-tuning"
    ours: ClassVar[tuple[str, ...]] = (METRICS, REPORT, MODEL, JOURNAL, LOG, RECIPE, MANIFEST)

    def _is_ours(self) -> bool:
        try:
            return TRAIN in self.recorded() and GRID not in self.recorded()
        except InvalidOption:
            return self.manifest.exists

    @property
    def checkpoints(self) -> str:
        """The folder in which transformers' trainer keeps its checkpoints."""
        return str(self.path / JOURNAL / CHECKPOINTS)

    def result(self, name: str) -> str:
        """The file with the test results of the model called ``name``."""
        return f"{JOURNAL}/{name}.json"
