"""Keeps the sparse models of a comparison: all, or the best one of each sparsity."""

from __future__ import annotations

from collections.abc import Iterable

from ecoflap.errors import InvalidOption
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.save import save
from ecoflap.run.compare.folder import MODELS, GridDirectory
from ecoflap.run.compare.record import Cell
from ecoflap.support.files import storage

NONE, ALL, BEST = "none", "all", "best"


def check_keep(keep: str) -> str:
    """Raises InvalidOption if ``keep`` is none of the choices."""
    if keep not in (NONE, ALL, BEST):
        raise InvalidOption(f"keep {keep}: choose from {NONE}, {ALL}, {BEST}")
    return keep


class KeptModels:
    """Saves the model of a cell in ``models/CELL`` of the comparison's folder.

    Args:
        keep: ``none``, ``all``, or ``best``: the best of each sparsity by the first test; of equal ones, the first.
        higher_is_better: of that test.
    """

    def __init__(self, folder: GridDirectory, checkpoint: Checkpoint, keep: str, higher_is_better: bool) -> None:
        self._folder, self._checkpoint, self._keep = folder, checkpoint, check_keep(keep)
        self._sign = 1.0 if higher_is_better else -1.0

    def offer(self, name: str, cell: Cell, others: Iterable[tuple[str, Cell]]) -> None:
        """Save the model in its current state if it is to be kept; remove worse ones of its sparsity.

        Args:
            name: of the cell's file, without its suffix.
            others: names and records of the cells that are finished.
        """
        if self._keep == NONE:
            return
        rivals = [(other, found) for other, found in others if found.sparsity == cell.sparsity and self._there(other)]
        if self._keep == BEST and any(self._worth(found) >= self._worth(cell) for _, found in rivals):
            return
        path = f"{MODELS}/{name}"
        with self._folder.manifest.writing(f"{MODELS}/"), storage(self._folder.path / path):
            (self._folder.path / MODELS).mkdir(exist_ok=True)
            self._folder.discard(path)  # of a cell that was interrupted
            save(self._checkpoint, self._folder.path / path)
            for other, _ in rivals if self._keep == BEST else ():
                self._folder.discard(f"{MODELS}/{other}")

    def _there(self, name: str) -> bool:
        return (self._folder.path / MODELS / name).is_dir()

    def _worth(self, cell: Cell) -> float:
        return float("-inf") if cell.value is None else self._sign * cell.value
