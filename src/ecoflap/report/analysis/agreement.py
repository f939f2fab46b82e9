"""Compares importance measures: Spearman's rank correlation of their block scores, for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ecoflap.errors import EcoflapError
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.importance.scores import Importance
from ecoflap.report.analyses import Agreement
from ecoflap.report.analysis.importance import block_scores
from ecoflap.report.analysis.registry import Analysis, NotApplicable
from ecoflap.report.charts.analysis import agreement_chart
from ecoflap.report.charts.static import picture
from ecoflap.support.progress import Labelled
from ecoflap.support.text import first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, with the mean rank for equal values; ``[n]``."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return mean_rank


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of two lists of equal length, -1 to 1; None if one is constant or they are shorter than 2.

    Raises:
        ValueError: the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    if len(first) < 2:
        return None
    a, b = (ranked - ranked.mean() for ranked in (ranks(first), ranks(second)))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale > 0 else None


# Errors of a measure that does not work on a model: an operator without a derivative, a shape, memory.
_UNFIT = (EcoflapError, NotImplementedError, RuntimeError, TypeError, ValueError)


def compute(subject: Subject) -> dict[str, Any]:
    """All registered measures with their default options; for the run's own measure, its scores.

    ``spearman`` is None if a measure gives all blocks the same score; ``skipped`` has the measures that don't work.
    """
    from ecoflap.importance.measure import measure_importance

    own, found, skipped = subject.importance, {}, {}
    for name in IMPORTANCES:
        if name == "uniform":
            continue
        if own is not None and own.method == name:
            found[name] = own
            continue
        try:
            found[name] = measure_importance(
                subject.checkpoint.model,
                subject.batches,
                name,
                seed=subject.recipe.seed,
                loss=subject.objective,
                anatomy=subject.anatomy,
                progress=Labelled(subject.progress, name),
            )
        except _UNFIT as error:
            skipped[name] = first_line(error)[:200]
    if len(found) < 2:
        raise NotApplicable(f"fewer than two measures work on this model ({'; '.join(skipped.values())})")
    scores = {name: block_values(importance) for name, importance in found.items()}
    return {
        "granularity": "block",
        "measures": list(scores),
        "spearman": [[spearman(first, second) for second in scores.values()] for first in scores.values()],
        "n": len(next(iter(scores.values()))),
        "samples": subject.measured_on,
        "own": own.method if own is not None else None,
        "skipped": skipped,
    }


def block_values(importance: Importance) -> list[float]:
    """The scores of :func:`block_scores`, in the order of the model."""
    return [score.score for blocks in block_scores(importance).values() for score in blocks.values()]


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """The matrix with colours and numbers: 1 is the same order of blocks, -1 the reverse."""
    return {"": picture([[agreement_chart(Agreement.model_validate(data))]])}


ANALYSIS = Analysis(draw, compute)
