"""Draws a chart as plotly JSON; colours are names of CSS variables, which the page's script resolves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log10
from typing import Any

from markupsafe import escape

from ecoflap.report.charts.chart import DASHES, Axis, Chart, Heat, Series
from ecoflap.support.formats import shortened

# As the markers of static.py and of the legend.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
_NAME = 26  # characters of a tick's name that are shown


def figure(chart: Chart) -> dict[str, Any]:
    """``{"data": […], "layout": {…}}``; every text is escaped, since plotly reads its own small HTML.

    Colours are ``"var(--name)"``, or ``"var(--name) 0.2"`` with an opacity; the page's script replaces them by the
    colours of the current scheme.
    """
    data = _heat(chart.heat) if chart.heat else [trace for series in chart.series for trace in _traces(series, chart)]
    layout: dict[str, Any] = {
        "xaxis": _axis(chart.x),
        "yaxis": _axis(chart.y),
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "showlegend": False,
        "barmode": "stack" if chart.stacked else "group",
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "var(--paper)",
            "bordercolor": "var(--line)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        },
    }
    if chart.horizontal:
        layout["yaxis"] |= {"autorange": "reversed", "showgrid": False} | _names(chart.series[0].x)
        layout["xaxis"] |= {"rangemode": "tozero"}
    else:
        layout["xaxis"]["showgrid"] = False
        if chart.series and chart.series[0].x and isinstance(chart.series[0].x[0], str):
            layout["xaxis"] |= _names(chart.series[0].x)
    if chart.heat:
        layout["yaxis"] |= {"autorange": "reversed", "showgrid": False} | _names(chart.heat.rows, 24)
        short = max(map(len, chart.heat.columns), default=0) <= 5
        layout["xaxis"] |= _names(chart.heat.columns, 10 if short else 24) | {"tickangle": 0 if short else -40}
    if chart.rules:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": rule.value,
                "y1": rule.value,
                "line": {"color": "var(--ink)", "width": 1.2, "dash": DASHES[rule.dash]},
            }
            for rule in chart.rules
        ]
    return {"data": data, "layout": layout}


def plain(text: str) -> str:
    """Text without plotly's tags, so that a name with ``<b>`` or ``<a href>`` is shown as it is."""
    return str(escape(text))


def _axis(axis: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {
        "title": {"text": plain(axis.title), "standoff": 6},
        "automargin": True,
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "fixedrange": False,
    }
    if axis.log:
        made["type"] = "log"
    if axis.limits is not None:
        low, high = axis.limits
        made["range"] = [round(log10(low), 6), round(log10(high), 6)] if axis.log else [low, high]
    if axis.ticks is not None:
        made |= {"tickmode": "array", "tickvals": list(axis.ticks), "ticktext": axis.tick_texts()}
    elif axis.percent:
        made["tickformat"] = ".3~%"  # as many decimals as a tick has
    return made


def _names(names: Sequence[Any], most: int = 60) -> dict[str, Any]:
    every = max(1, -(-len(names) // most))
    places = list(range(0, len(names), every))
    texts = [str(names[i]) for i in places]
    return {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": [plain(shortened(name, _NAME)) for name in texts],
    }


def _traces(series: Series, chart: Chart) -> list[dict[str, Any]]:
    colour = f"var(--{series.style.colour})"
    named = bool(series.x) and isinstance(series.x[0], str)
    x = list(range(len(series.x))) if named else list(series.x)
    trace: dict[str, Any] = {"name": plain(series.name), "x": x, "y": list(series.y), "hoverinfo": "text"}
    if series.hover:
        trace["hovertext"] = [plain(text).replace("\n", "<br>") for text in series.hover]
    if series.kind == "bar":
        trace |= {"type": "bar", "marker": {"color": colour, "line": {"width": 0}}}
        if not named and len(x) <= 8:
            trace["width"] = max(0.1 * len(x), 0.3)
        if chart.horizontal:
            trace |= {"orientation": "h", "x": list(series.y), "y": x}
        return [trace]
    line = {"color": colour, "dash": DASHES[series.style.dash], "width": 2}
    trace |= {"type": "scatter", "line": line}
    if series.kind == "step":
        # Each value at the middle of its bin; an empty bin at each end lets the outline end on the axis.
        edges = [float(edge) for edge in series.x]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        return [trace | {"x": middles, "mode": "lines", "line": line | {"shape": "hvh"}}]
    trace["mode"] = "markers" if series.kind == "points" else "lines+markers"
    trace["marker"] = {"color": colour, "symbol": _SYMBOLS[series.style.marker], "size": 7 if len(x) <= 60 else 5}
    if chart.on_bars:
        trace["marker"] |= {"size": 10, "line": {"color": "var(--card)", "width": 1.5}}
    if series.error is not None:
        below, above = series.error_lengths(chart.y)
        trace["error_y"] = {
            "type": "data",
            "array": above,
            "arrayminus": below,
            "symmetric": False,
            "color": colour,
            "thickness": 1.4,
            "width": 3,
        }
    if series.band is None:
        return [trace]
    low, high = series.band
    area = {
        "type": "scatter",
        "name": plain(series.name),
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "mode": "lines",
        "line": {"width": 0, "color": colour},
        "fill": "toself",
        "fillcolor": f"{colour} 0.18",
        "hoverinfo": "skip",
    }
    return [area, trace]


def _heat(heat: Heat) -> list[dict[str, Any]]:
    ends = ["var(--cold)", "var(--card)", "var(--heat)"] if heat.diverging else ["var(--card)", "var(--heat)"]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [list(row) for row in heat.z],
        "zmin": heat.low,
        "zmax": heat.high if heat.high > heat.low else heat.low + 1,
        "colorscale": [[index / (len(ends) - 1), colour] for index, colour in enumerate(ends)],
        "showscale": False,
        "xgap": 1 if len(heat.columns) <= 60 else 0,
        "ygap": 1 if len(heat.rows) <= 60 else 0,
        "hoverongaps": False,
        "hoverinfo": "text",
        "hovertext": [[plain(text).replace("\n", "<br>") for text in row] for row in heat.hover],
    }
    if heat.text is not None:
        trace |= {"text": [[plain(text) for text in row] for row in heat.text], "texttemplate": "%{text}"}
        trace["textfont"] = {"color": "var(--ink)"}
    return [trace]
