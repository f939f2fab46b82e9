"""Draws charts with matplotlib: as inline SVG of a page (for print, and until JavaScript has run), and as files.

On a page, colours are CSS variables, and the page has captions and legends. A file has the page's light colours, and
its own captions and legends.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from ecoflap.report.charts.chart import HUES, Axis, Chart, Heat, Rule, Series
from ecoflap.support.files import write_atomically
from ecoflap.support.formats import shortened

# Placeholder colours for the page's CSS variables; they are replaced in the SVG after drawing.
_NAMES = ("ink", "line", "vision", "language", "bridge", "other", "card", "heat", "cold")
_STAND_IN = {name: f"#01{i:02x}02" for i, name in enumerate((*_NAMES, *(f"c{i + 1}" for i in range(HUES))))}
# The page's light colours, for files.
COLOURS = {
    "ink": "#1b2430", "line": "#ccd4dc", "card": "#f4f6f8", "heat": "#5b96d0", "cold": "#dd9457",
    "vision": "#2d6fb4", "language": "#b8551b", "bridge": "#3a7d4d", "other": "#75658f",
    "c1": "#2d6fb4", "c2": "#b8551b", "c3": "#3a7d4d", "c4": "#a3306f", "c5": "#75658f", "c6": "#0b7a83",
    "c7": "#866a00", "c8": "#4a5666",
}  # fmt: skip
DPI = 120
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "^", "P", "X", "v", "*")  # as the symbols of plotly.py and the legend
_SIZE = (4.6, 2.5)  # inches; at 390 px of screen width the labels are still above 9 px
_WIDE = (7.2, 3.6)
_ROW = 0.34  # inches of a row of horizontal bars or of a heat map
_NAME = 26  # characters of a tick's name that are shown


def _style(colours: Mapping[str, str]) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",  # selectable text in the page's font
        "svg.hashsalt": "ecoflap",  # the same run gives the same bytes
        "font.size": 9.5,
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": colours["ink"],
        "text.parse_math": False,  # a dollar in a name is a dollar
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
    }


def svg(chart: Chart, prefix: str) -> str:
    """The chart as an ``<svg>`` element: no XML prolog, no metadata, colours as CSS variables.

    Args:
        chart: what to draw.
        prefix: starts every id in the drawing, so that ids stay unique on a page with several.
    """
    with rc_context(_style(_STAND_IN)):
        figure = Figure(figsize=_size(chart), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        _chart(axes, chart, _STAND_IN)
        return _clean(figure, prefix)


def picture(rows: Sequence[Sequence[Chart]], title: str = "") -> Figure:
    """Charts with captions and legends, for a file: ``rows`` of panels. Panels with equal legends share one."""
    rows = [row for row in rows if row]
    sizes = [[_size(chart) for chart in row] for row in rows]
    heights = [max(height for _, height in row) + 0.4 for row in sizes]
    width = max(sum(width for width, _ in row) for row in sizes)
    with drawing():
        figure = Figure(figsize=(width + 0.6, sum(heights) + (0.3 if title else 0.0)), layout="constrained")
        for part, row, wide in zip(
            figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0], rows, sizes, strict=True
        ):
            panels = part.subplots(1, len(row), squeeze=False, width_ratios=[width for width, _ in wide])[0]
            shared = all(chart.legend == row[0].legend and chart.rules == row[0].rules for chart in row)
            for place, (axes, chart) in enumerate(zip(panels, row, strict=True)):
                _chart(axes, chart, COLOURS)
                caption = f"{shortened(chart.caption, 44)} ({chart.modality})" if chart.modality else chart.caption
                if chart.heat and not chart.heat.text:
                    caption += f": {' to '.join(chart.heat.ends)}"
                axes.set_title(caption, loc="left", fontsize=9.5)
                if (chart.legend or chart.rules) and (not shared or place == len(row) - 1):
                    _legend(axes)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        return figure


KINDS = ("png", "svg")  # of files


def save(figure: Figure, stem: Path) -> list[Path]:
    """Atomically write ``stem``.png and ``stem``.svg; the same figure gives the same bytes.

    Raises:
        StorageError: a file can't be written.
    """
    made = []
    for kind, metadata in zip(KINDS, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        buffer = io.BytesIO()
        with drawing():
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        content = buffer.getvalue()
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))  # type: ignore[misc]
        made.append(path)
    return made


@contextmanager
def drawing() -> Iterator[None]:
    """Context with the style of files, for making and saving a figure; missing letters of the font give no warning."""
    with rc_context(_style(COLOURS)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _size(chart: Chart) -> tuple[float, float]:
    width, height = _WIDE if chart.wide else _SIZE
    rows = len(chart.heat.rows) if chart.heat else len(chart.series[0].x) if chart.horizontal else 0
    return width, max(height, 0.8 + _ROW * rows) if rows else height


def _chart(axes: Axes, chart: Chart, colours: Mapping[str, str]) -> None:
    if chart.heat:
        _heat(axes, chart.heat, colours)
    else:
        axes.grid(axis="x" if chart.horizontal else "y")
        _series(axes, chart, colours)
        _rules(axes, chart.rules, colours)
        _scale(axes.xaxis, chart.x)
        _scale(axes.yaxis, chart.y)
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)


def _legend(axes: Axes) -> None:
    """A legend at the right of the panel, with each name once."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [shortened(name, 36) for name in entries]
    axes.legend(list(entries.values()), names, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _series(axes: Axes, chart: Chart, colours: Mapping[str, str]) -> None:
    bars = [series for series in chart.series if series.kind == "bar"]
    base: dict[Any, float] = {}
    for series in chart.series:
        if series.kind == "bar":
            _bars(axes, series, chart, base, bars.index(series), len(bars), colours)
            continue
        colour, dash = colours[series.style.colour], _DASHES[series.style.dash]
        y = [float("nan") if value is None else value for value in series.y]
        if series.kind == "step":
            axes.stairs(
                y, [float(edge) for edge in series.x], color=colour, linestyle=dash, linewidth=1.6, label=series.name
            )
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
            markeredgecolor=colours["card"] if chart.on_bars else colour,
            linewidth=1.5,
            label=series.name,
        )


def _bars(
    axes: Axes,
    series: Series,
    chart: Chart,
    base: dict[Any, float],
    index: int,
    count: int,
    colours: Mapping[str, str],
) -> None:
    named = bool(series.x) and isinstance(series.x[0], str)
    places = [float(place) for place in (range(len(series.x)) if named else series.x)]
    values = [value or 0.0 for value in series.y]
    colour = colours[series.style.colour]
    width = 0.8 if chart.horizontal or len(places) > 8 else max(0.1 * len(places), 0.3)  # few bars are not too wide
    starts = [base.get(place, 0.0) for place in places] if chart.stacked else 0.0
    if not chart.stacked and count > 1:
        width = 0.8 / count
        places = [place + width * (index - (count - 1) / 2) for place in places]
    if chart.horizontal:
        axes.barh(places, values, height=width, left=starts, color=colour, label=series.name)
    else:
        axes.bar(places, values, width=width, bottom=starts, color=colour, label=series.name)
    if chart.stacked:
        base.update({place: base.get(place, 0.0) + value for place, value in zip(places, values, strict=True)})
    if named and index == 0:
        axis = axes.yaxis if chart.horizontal else axes.xaxis
        axis.set_ticks(range(len(series.x)), [shortened(str(name), _NAME) for name in series.x])
        if chart.horizontal:
            axes.set_ylim(len(series.x) - 0.4, -0.6)  # the first one at the top


def _rules(axes: Axes, rules: Sequence[Rule], colours: Mapping[str, str]) -> None:
    for rule in rules:
        axes.axhline(rule.value, linestyle=_DASHES[rule.dash], color=colours["ink"], linewidth=1.1, label=rule.label)


def _scale(axis: Any, wanted: Axis) -> None:
    if wanted.log:
        axis._set_axes_scale("log")
    if wanted.limits is not None:
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*wanted.limits)
    if wanted.ticks is not None:
        axis.set_ticks(list(wanted.ticks), wanted.tick_texts())
        axis.set_minor_locator(NullLocator())
    elif wanted.percent:
        axis.set_major_formatter(_PerCent())
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


class _PerCent(ScalarFormatter):
    """Fractions in per cent, with as many decimals as the distance of the ticks needs."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        shown = [100 * float(place) for place in self.locs]
        decimals = next((n for n in range(6) if all(abs(v - round(v, n)) < 1e-6 for v in shown)), 6)
        return f"{100 * x:.{decimals}f}%".replace("-", "\N{MINUS SIGN}")


def _heat(axes: Axes, heat: Heat, colours: Mapping[str, str]) -> None:
    """Cells as rectangles whose opacity is the value, so that one colour is enough in every scheme."""
    span = (heat.high - heat.low) or 1.0
    for row, values in enumerate(heat.z):
        for column, value in enumerate(values):
            if value is None:
                continue
            level = min(max((value - heat.low) / span, 0.0), 1.0)
            name = "cold" if heat.diverging and level < 0.5 else "heat"
            alpha = abs(2 * level - 1) if heat.diverging else level
            cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colours[name], alpha=round(alpha, 3))
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
