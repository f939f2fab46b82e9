"""Reads ``predictions.json``: the answers of the dense and the pruned model to each sample, and examples of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import field_validator

from ecoflap.report.reading import Content, Count, Finite

if TYPE_CHECKING:
    pass  # from Python 3.11 on; read by type checkers alone

PREDICTIONS_FILE = "predictions.json"
EXAMPLES = 8  # of each kind on the page
_LARGEST = 1_000_000  # bytes of an image in the page
_MOST_PIXELS = 1_000_000  # a run writes images of 160 × 160 at most

# Titles by kind, in the order of the page.
KINDS = {
    "only_dense": "only the dense model right",
    "only_pruned": "only the pruned model right",
    "both_wrong": "both wrong",
    "both_right": "both right",
}


class Row(Content):
    """One sample: the question, the truth, and what each model answered; a score of at least 0.5 is right."""

    index: int
    question: str | None = None
    truth: str
    dense: str
    pruned: str
    dense_score: Finite
    pruned_score: Finite
    kind: str | None = None
    picture: str | None = None

    @field_validator("truth", "dense", "pruned", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value

    @property
    def outcome(self) -> str:
        """The sample's kind, one of four."""
        dense, pruned = self.dense_score >= 0.5, self.pruned_score >= 0.5
        if dense == pruned:
            return "both_right" if dense else "both_wrong"
        return "only_dense" if dense else "only_pruned"


class Counts(Content):
    """Number of samples by kind."""

    both_right: Count
    only_dense: Count
    only_pruned: Count
    both_wrong: Count

    @property
    def total(self) -> int:
        """All samples."""
        return self.both_right + self.only_dense + self.only_pruned + self.both_wrong


class TaskPredictions(Content):
    """The samples of one task."""

    rows: list[Row]
    counts: Counts


class Predictions(Content):
    """``predictions.json``."""

    tasks: dict[str, TaskPredictions] = {}


@dataclass(frozen=True)
class Example:
    """A sample of the gallery; ``picture`` is a ``data:`` address, or None."""

    row: Row
    picture: str | None


@dataclass(frozen=True)
class Group:
    """One of the four kinds of a task: number of samples, their share, and examples."""

    kind: str
    title: str
    count: int
    share: float
    examples: list[Example]


def gallery(folder: Path, task: TaskPredictions) -> list[Group]:
    """The four kinds of a task with up to eight examples each, those with an image first.

    Args:
        folder: the run directory with the images. Only PNG files in it are shown.
        task: the task's samples.
    """
    groups = []
    for kind, title in KINDS.items():
        rows = [row for row in task.rows if row.outcome == kind]
        shown = sorted(rows, key=lambda row: row.picture is None)[:EXAMPLES]
        count = getattr(task.counts, kind)
        examples = [Example(row, _picture(folder, row.picture)) for row in shown]
        groups.append(Group(kind, title, count, count / (task.counts.total or 1), examples))
    return groups


def picture_of(folder: Path, name: str | None) -> bytes | None:
    """A small PNG image of the run directory; None for anything else."""
    if name is None:
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            small = picture.width * picture.height <= _MOST_PIXELS
            picture.verify()
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None  # no file, or no valid PNG
    return content if small else None


def _picture(folder: Path, name: str | None) -> str | None:
    """:func:`picture_of` as a ``data:`` address."""
    content = picture_of(folder, name)
    return None if content is None else "data:image/png;base64," + base64.b64encode(content).decode()
