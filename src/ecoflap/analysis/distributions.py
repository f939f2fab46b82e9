"""How weights, gradients and local scores are distributed in each tower: why no one threshold fits all towers.

Local score: Wanda's |w|·‖x‖ (Sun et al. 2023, arXiv 2306.11695). The comparison is that of Sung et al. 2024 (ECoFLaP,
arXiv 2310.02998), figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ecoflap.analysis.drawing import colour_of, drawing, panels, title_of
from ecoflap.analysis.parts import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.analysis.histograms import LogHistogram
    from ecoflap.analysis.subject import Subject

KINDS = {"weight": "|weight|", "gradient": "|gradient|", "local": "local score |w|·‖x‖"}


def compute(subject: Subject) -> dict[str, Any]:
    """Histograms per tower of the dense model, over all its prunable weights.

    ``gradient``: of the mean gradient over the calibration batches. ``local``: the norm of each input over all real
    tokens of the batches. Layers that no token reached have no local score.
    """
    from ecoflap.analysis.gradients import mean_gradients
    from ecoflap.analysis.histograms import LogHistogram
    from ecoflap.analysis.subject import computing
    from ecoflap.statistics.dense import dense_statistics

    model, anatomy, batches = subject.checkpoint.model, subject.anatomy, subject.batches
    counts: dict[str, dict[str, LogHistogram]] = {
        tower.name: {kind: LogHistogram() for kind in KINDS} for tower in anatomy.towers
    }
    total = len(batches) + sum(1 for block in anatomy.blocks if block.layers)
    with computing(model), subject.progress.stage("distributions", total=total) as task:
        gradients = mean_gradients(model, anatomy, batches, subject.objective, task)
        for layer in anatomy.layers:
            counts[layer.tower]["weight"].add(model.get_parameter(layer.name))
            counts[layer.tower]["gradient"].add(gradients.pop(layer.name))
        for block, statistics in dense_statistics(model, anatomy, batches, subject.objective):
            for layer in block.layers:
                found = statistics[layer.name]
                if found is not None:
                    weight = model.get_parameter(layer.name).detach()
                    norm = found.norm[:, None] if layer.transposed else found.norm
                    counts[layer.tower]["local"].add(weight * norm)
            task.advance(1, block.name)
    return {
        "samples": subject.measured_on,
        "towers": {
            tower.name: {
                "modality": tower.modality,
                **{kind: histogram.to_json() for kind, histogram in counts[tower.name].items()},
            }
            for tower in anatomy.towers
        },
    }


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """A row a tower, a column a quantity; one scale a column, so that towers compare. The line is the median."""
    towers = data["towers"]
    from matplotlib.ticker import MaxNLocator

    with drawing():
        figure, rows = panels(len(towers), len(KINDS), height=1.7)
        for column, (kind, label) in enumerate(KINDS.items()):
            edges = [edge for tower in towers.values() for edge in tower[kind]["log10_edges"] if tower[kind]["share"]]
            for row, (name, tower) in zip(rows, towers.items(), strict=True):
                axes, found, colour = row[column], tower[kind], colour_of(tower["modality"])
                if found["share"]:
                    share = 100 * np.array(found["share"])
                    axes.stairs(share, found["log10_edges"], fill=True, color=colour, alpha=0.75)
                    axes.axvline(np.log10(found["median"]), color="black", linewidth=1, linestyle="--")
                    note = f"median {found['median']:.1e}" + (f"\n{found['zeros']:.0%} zeros" if found["zeros"] else "")
                    axes.text(0.03, 0.96, note, transform=axes.transAxes, va="top", fontsize=7)
                    axes.set_xlim(*_visible(towers, kind, min(edges), max(edges)))
                    axes.set_ylim(0, 1.25 * share.max())
                axes.xaxis.set_major_formatter(lambda decade, _: f"$10^{{{decade:g}}}$")
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                if column == 0:
                    axes.set_title(title_of(name, tower["modality"]))
                    axes.set_ylabel("% of weights")
            rows[-1][column].set_xlabel(label)
        return {"": figure}


def _visible(towers: Mapping[str, Any], kind: str, low: float, high: float) -> tuple[float, float]:
    """The range in which all but a thousandth of any tower's values lie: a few tiny ones would flatten the rest."""
    starts, ends = [], []
    for tower in towers.values():
        share, edges = np.array(tower[kind]["share"]), tower[kind]["log10_edges"]
        if not len(share):
            continue
        below = np.cumsum(share) / share.sum()
        starts.append(edges[int(np.searchsorted(below, 0.001))])
        ends.append(edges[int(np.searchsorted(below, 0.9999)) + 1] if below[-2:][0] < 0.9999 else edges[-1])
    return max(low, min(starts)), min(high, max(ends))


ANALYSIS = Analysis(draw, compute)
