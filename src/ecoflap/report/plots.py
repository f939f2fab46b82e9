"""The plots as inline SVG whose colours and font are the page's, so that one drawing serves light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ecoflap.report.data import BlockRow

# Colours that stand for the page's CSS variables; replaced in the SVG after drawing.
_INK, _FAINT = "#010203", "#040506"
_MODALITY = {"vision": "#070809", "language": "#0a0b0c", "bridge": "#0d0e0f"}
_OTHER = "#101112"
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _MODALITY["vision"]: "var(--vision)",
    _MODALITY["language"]: "var(--language)",
    _MODALITY["bridge"]: "var(--bridge)",
    _OTHER: "var(--other)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font
    "svg.hashsalt": "ecoflap",  # the same run gives the same bytes
    "font.size": 9.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
_SIZE = (4.6, 2.5)  # inches; at 390 px of screen width the labels are still above 9 px


def sparsity_panel(
    blocks: Sequence[BlockRow], *, target: float, cap: float | None, top: float = 1.0, prefix: str = "s"
) -> str:
    """Bars of sparsity per block of one tower, in the order of the model.

    Args:
        blocks: the tower's blocks; each bar is the achieved sparsity, or the target before pruning.
        target: the sparsity asked for, a dashed line.
        cap: the most that a block may lose, a dotted line; None draws none.
        top: upper end of the axis, the same for all towers so that they compare.
        prefix: starts every id in the drawing, so that ids stay unique on a page with several.

    Returns:
        An ``<svg>`` element.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(blocks)
        width = 0.8 if len(blocks) > 8 else 0.1 * len(blocks)  # a few blocks give bars, not walls
        axes.bar(range(len(blocks)), [block.shown for block in blocks], width=width, color=_colour(blocks))
        _line(axes, target, "--", f"target {100 * target:.3g} %")
        if cap is not None and cap < 1:
            _line(axes, cap, ":", f"cap {100 * cap:.3g} %")
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("sparsity")
        _legend(axes)
        return _svg(figure, prefix)


def importance_panel(blocks: Sequence[BlockRow], *, limits: tuple[float, float], prefix: str = "i") -> str:
    """Importance per block of one tower with standard errors, on a logarithmic axis.

    Blocks without a positive score have no place on the axis and are left out; the page says how many.

    Args:
        blocks: the tower's blocks.
        limits: ends of the axis, the same for all towers so that they compare.
        prefix: starts every id in the drawing, so that ids stay unique on a page with several.

    Returns:
        An ``<svg>`` element.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(blocks)
        shown = [(i, b.score, b.stderr or 0.0) for i, b in enumerate(blocks) if b.score is not None and b.score > 0]
        if shown:
            places, scores, errors = ([row[k] for row in shown] for k in range(3))
            # A bar that reaches below zero would vanish from a logarithmic axis: it ends at the axis instead.
            low = [min(error, score - limits[0]) for score, error in zip(scores, errors, strict=True)]
            axes.errorbar(
                places,
                scores,
                yerr=[[max(value, 0.0) for value in low], errors],
                fmt="o",
                markersize=4.5,
                linewidth=1.4,
                color=_colour(blocks),
            )
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        axes.set_ylabel("score")
        return _svg(figure, prefix)


def importance_limits(blocks: Sequence[BlockRow]) -> tuple[float, float] | None:
    """Ends of a logarithmic axis on which every positive score has its place; None where there is none."""
    scores = [block.score for block in blocks if block.score is not None and block.score > 0]
    if not scores:
        return None
    tops = [block.score + (block.stderr or 0.0) for block in blocks if block.score is not None]
    return min(scores) / 2, max(tops) * 1.6


def _axes(blocks: Sequence[BlockRow]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(axis="y")
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_xlabel("block")
    return figure, axes


def _line(axes: Axes, value: float, style: str, label: str) -> None:
    axes.axhline(value, linestyle=style, color=_INK, linewidth=1.1, label=label)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)


def _colour(blocks: Sequence[BlockRow]) -> str:
    return _MODALITY.get(blocks[0].modality, _OTHER) if blocks else _OTHER


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an ``<svg>`` element alone: no XML prolog, no metadata, colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.strip()
