"""Importance per block and per layer with standard errors, a panel a tower; drawn of ``importance.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecoflap.allocation.rules import RULES
from ecoflap.importance.scores import Importance, Score
from ecoflap.report.analysis.drawing import GREY, colour_of, drawing, panels, shown_ticks, title_of
from ecoflap.report.analysis.registry import Analysis, NotApplicable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject


def block_scores(importance: Importance) -> dict[str, dict[str, Score]]:
    """Tower → block → its score as the rule of its measure sees it: the sum of its layers' scores, or their mean.

    The sum is that of measures for the rule ``proportional``; the others (OWL, AlphaPruning, DLP) give each layer a
    level, and a block the mean of its layers'. The standard error is √(Σ stderr²), or that divided by the number.
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
    """Block scores with error bars of one standard error; grey dots are their layers."""
    importance = subject.importance
    if importance is None:
        raise NotApplicable("the run measured no importance")
    modality = {layer.tower: layer.modality for layer in importance.layers}
    towers = block_scores(importance)
    with drawing():
        figure, rows = panels(1, len(towers))
        for axes, (tower, blocks) in zip(rows[0], towers.items(), strict=True):
            _panel(axes, importance, tower, blocks, colour_of(modality[tower]))
            axes.set_title(title_of(tower, modality[tower]))
        positive = [axes for axes in rows[0] if axes.get_yscale() == "log"]
        if positive:  # one scale for all towers, so that they compare
            low = min(axes.get_ylim()[0] for axes in positive)
            high = max(axes.get_ylim()[1] for axes in positive)
            for axes in positive:
                axes.set_ylim(low, high)
        rows[0][0].set_ylabel(f"score ({importance.method})")
        return {"": figure}


def _panel(axes: Axes, importance: Importance, tower: str, blocks: Mapping[str, Score], colour: str) -> None:
    number = {block: position for position, block in enumerate(blocks)}
    layers = [(number[layer.block], importance.scores[layer.name].score) for layer in importance.layers
              if layer.tower == tower]  # fmt: skip
    seen = [(place, score) for place, score in layers if score > 0]
    axes.plot([p for p, _ in seen], [s for _, s in seen], ".", color=GREY, markersize=3, alpha=0.6, label="layers")
    shown = [(number[block], score) for block, score in blocks.items() if score.score > 0]
    if shown:
        centre = [score.score for _, score in shown]
        errors = [score.stderr for _, score in shown]
        below = [min(error, 0.9 * score) for error, score in zip(errors, centre, strict=True)]  # stays on a log axis
        axes.errorbar([place for place, _ in shown], centre, yerr=[below, errors], fmt="o", markersize=4.5,
                      color=colour, capsize=2, label="block, ± standard error")  # fmt: skip
        axes.set_yscale("log")
    axes.set_xticks(shown_ticks(len(blocks)))
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_xlabel("block")
    axes.legend(fontsize=7, loc="best")


ANALYSIS = Analysis(draw)
