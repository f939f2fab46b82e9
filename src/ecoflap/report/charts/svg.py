"""Draws a chart as inline SVG in the page's own colours and font: for paper, without JavaScript, and until it loads."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from ecoflap.report.charts.chart import HUES, Axis, Chart, Heat, Rule, Series
from ecoflap.support.formats import shortened

# Colours that stand for the page's CSS variables; they are replaced in the SVG after drawing.
_NAMES = ("ink", "line", "vision", "language", "bridge", "other", "card", "heat", "cold")
_STAND_IN = {name: f"#01{i:02x}02" for i, name in enumerate((*_NAMES, *(f"c{i + 1}" for i in range(HUES))))}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "^", "P", "X", "v", "*")  # as the symbols of interactive.py and the legend
_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's font
    "svg.hashsalt": "ecoflap",  # the same run gives the same bytes
    "font.size": 9.5,
    "axes.edgecolor": _STAND_IN["line"],
    "axes.labelcolor": _STAND_IN["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _STAND_IN["ink"],
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": _STAND_IN["ink"],
    "ytick.color": _STAND_IN["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": _STAND_IN["line"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
_SIZE = (4.6, 2.5)  # inches; at 390 px of screen width the labels are still above 9 px
_WIDE = (7.2, 3.6)
_ROW = 0.34  # inches of a row of lying bars or of a heat map
_NAME = 26  # characters of a tick's name that are shown


def svg(chart: Chart, prefix: str) -> str:
    """The chart as an ``<svg>`` element: no XML prolog, no metadata, colours as CSS variables.

    Args:
        chart: what to draw.
        prefix: starts every id in the drawing, so that ids stay unique on a page with several.
    """
    with rc_context(_STYLE):
        width, height = _WIDE if chart.wide else _SIZE
        rows = len(chart.heat.rows) if chart.heat else len(chart.series[0].x) if chart.horizontal else 0
        figure = Figure(figsize=(width, max(height, 0.8 + _ROW * rows) if rows else height), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        if chart.heat:
            _heat(axes, chart.heat)
        else:
            axes.grid(axis="x" if chart.horizontal else "y")
            _series(axes, chart)
            _rules(axes, chart.rules)
            _scale(axes.xaxis, chart.x)
            _scale(axes.yaxis, chart.y)
        axes.set_xlabel(chart.x.title)
        axes.set_ylabel(chart.y.title)
        return _clean(figure, prefix)


def _series(axes: Axes, chart: Chart) -> None:
    bars = [series for series in chart.series if series.kind == "bar"]
    base: dict[Any, float] = {}
    for series in chart.series:
        if series.kind == "bar":
            _bars(axes, series, chart, base, bars.index(series), len(bars))
            continue
        colour, dash = _STAND_IN[series.style.colour], _DASHES[series.style.dash]
        y = [float("nan") if value is None else value for value in series.y]
        if series.kind == "step":
            axes.stairs(y, [float(edge) for edge in series.x], color=colour, linestyle=dash, linewidth=1.6)
            continue
        if series.band is not None:
            axes.fill_between(series.x, *series.band, color=colour, alpha=0.18, linewidth=0)
        axes.errorbar(
            series.x,
            y,
            yerr=None if series.error is None else list(series.error_lengths(chart.y)),
            color=colour,
            linestyle="none" if series.kind == "points" else dash,
            marker=_MARKERS[series.style.marker],
            markersize=7 if chart.on_bars else 4.5 if len(y) <= 60 else 3,
            markeredgecolor=_STAND_IN["card"] if chart.on_bars else colour,
            linewidth=1.5,
        )


def _bars(axes: Axes, series: Series, chart: Chart, base: dict[Any, float], index: int, count: int) -> None:
    named = bool(series.x) and isinstance(series.x[0], str)
    places = [float(place) for place in (range(len(series.x)) if named else series.x)]
    values = [value or 0.0 for value in series.y]
    colour = _STAND_IN[series.style.colour]
    width = 0.8 if chart.horizontal or len(places) > 8 else max(0.1 * len(places), 0.3)  # a few give bars, not walls
    starts = [base.get(place, 0.0) for place in places] if chart.stacked else 0.0
    if not chart.stacked and count > 1:
        width = 0.8 / count
        places = [place + width * (index - (count - 1) / 2) for place in places]
    if chart.horizontal:
        axes.barh(places, values, height=width, left=starts, color=colour)
    else:
        axes.bar(places, values, width=width, bottom=starts, color=colour)
    if chart.stacked:
        base.update({place: base.get(place, 0.0) + value for place, value in zip(places, values, strict=True)})
    if named and index == 0:
        axis = axes.yaxis if chart.horizontal else axes.xaxis
        axis.set_ticks(range(len(series.x)), [shortened(str(name), _NAME) for name in series.x])
        if chart.horizontal:
            axes.set_ylim(len(series.x) - 0.4, -0.6)  # the first on top


def _rules(axes: Axes, rules: Sequence[Rule]) -> None:
    for rule in rules:
        axes.axhline(rule.value, linestyle=_DASHES[rule.dash], color=_STAND_IN["ink"], linewidth=1.1)


def _scale(axis: Any, wanted: Axis) -> None:
    if wanted.log:
        axis._set_axes_scale("log")
    if wanted.limits is not None:
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*wanted.limits)
    if wanted.ticks is not None:
        axis.set_ticks(list(wanted.ticks), wanted.tick_texts())
        axis.set_minor_locator(NullLocator())
    elif wanted.percent:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_major_locator(MaxNLocator(5))


def _heat(axes: Axes, heat: Heat) -> None:
    """Cells as rectangles whose opacity is the value: one colour serves every scheme."""
    span = (heat.high - heat.low) or 1.0
    for row, values in enumerate(heat.z):
        for column, value in enumerate(values):
            if value is None:
                continue
            level = min(max((value - heat.low) / span, 0.0), 1.0)
            name = "cold" if heat.diverging and level < 0.5 else "heat"
            alpha = abs(2 * level - 1) if heat.diverging else level
            cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_STAND_IN[name], alpha=round(alpha, 3))
            axes.add_patch(cell)
            if heat.text is not None:
                axes.text(column, row, heat.text[row][column], ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(heat.columns) - 0.5)
    axes.set_ylim(len(heat.rows) - 0.5, -0.5)
    every = max(1, len(heat.columns) // 12)
    columns = list(range(0, len(heat.columns), every))
    long = max((len(heat.columns[i]) for i in columns), default=0) > 5
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(columns, [shortened(heat.columns[i], _NAME) for i in columns], **turn)
    every = max(1, len(heat.rows) // 24)
    rows = list(range(0, len(heat.rows), every))
    axes.set_yticks(rows, [shortened(heat.rows[i], _NAME) for i in rows])


def _clean(figure: Figure, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for name, stand_in in _STAND_IN.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text.strip()
