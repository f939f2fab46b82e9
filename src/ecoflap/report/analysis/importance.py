"""Draws the importance of blocks and layers with standard errors, a panel for each tower, from ``importance.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecoflap.allocation.rules import RULES
from ecoflap.importance.scores import Importance, Score
from ecoflap.report.analysis.registry import Analysis, NotApplicable
from ecoflap.report.charts import run as charts
from ecoflap.report.charts.static import picture
from ecoflap.report.data import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject


def block_scores(importance: Importance) -> dict[str, dict[str, Score]]:
    """Block scores by tower and block, as the measure's rule combines them: the sum of the layers' scores, or the mean.

    It is the sum for measures of the rule ``proportional``, and the mean for others (OWL, AlphaPruning, DLP). The
    standard error is √(Σ stderr²), for a mean divided by the number of layers.
    """
    aggregate = getattr(RULES.get(str(importance.settings.get("rule", "proportional"))), "aggregate", "sum")
    members: dict[str, dict[str, list[Score]]] = {}
    for layer in importance.layers:
        members.setdefault(layer.tower, {}).setdefault(layer.block, []).append(importance.scores[layer.name])
    return {
        tower: {block: _together(scores, aggregate == "layer-mean") for block, scores in blocks.items()}
        for tower, blocks in members.items()
    }


def _together(scores: Sequence[Score], mean: bool) -> Score:
    parts = len(scores) if mean else 1
    error = math.sqrt(math.fsum(score.stderr**2 for score in scores))
    return Score(math.fsum(score.score for score in scores) / parts, error / parts, min(score.n for score in scores))


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """Top: block scores ± one standard error; bottom: scores of single matrices by kind."""
    if subject.importance is None:
        raise NotApplicable("the run measured no importance")
    run = read_run(subject.path)
    rows = [charts.importance_charts(run.blocks()), charts.layer_importance_charts(run)]
    if not any(rows):
        raise NotApplicable("no block has a score above zero")
    return {"": picture(rows, f"importance: {subject.importance.method}")}


ANALYSIS = Analysis(draw)
