"""Shared parts of the pages: templates, charts in both forms, scripts and the content security policy."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ecoflap.report.charts.chart import Chart, Entry, Rule
from ecoflap.report.charts.plotly import figure, plain
from ecoflap.report.charts.static import svg
from ecoflap.report.places import text_without_places
from ecoflap.support import formats
from ecoflap.support.text import visible

_SCRIPTS = ("tables.js", "plots.js")


@dataclass(frozen=True)
class Panel:
    """A chart on the page: its id, and the SVG that is shown until plotly has drawn it, and in print."""

    id: str
    chart: Chart
    svg: Markup


@dataclass(frozen=True)
class PanelGroup:
    """Charts side by side; ``legend`` and ``rules`` are those that all share, empty if they differ."""

    panels: list[Panel]
    legend: list[Entry]
    rules: list[Rule]

    def __bool__(self) -> bool:
        return bool(self.panels)


@dataclass
class Plots:
    """Collects the charts of one page."""

    figures: dict[str, Any] = field(default_factory=dict)

    def group(self, prefix: str, charts: Sequence[Chart]) -> PanelGroup:
        """Draw charts and store their figures as ``prefix0``, ``prefix1``, …"""
        panels = []
        for index, chart in enumerate(charts):
            name = f"{prefix}{index}"
            self.figures[name] = figure(chart)
            panels.append(Panel(name, chart, Markup(svg(chart, name))))
        legends = [chart.legend for chart in charts]
        shared = legends[0] if legends and all(legend == legends[0] for legend in legends) else []
        rules = [list(chart.rules) for chart in charts]
        return PanelGroup(panels, shared, rules[0] if rules and all(own == rules[0] for own in rules) else [])

    def context(self) -> dict[str, Any]:
        """Values for the base template: the figures as JSON, the scripts, plotly packed, and the policy."""
        scripts = _page_script()
        hashes = [_hash(scripts)]
        packed = ""
        if self.figures:
            source, packed = plotly()
            hashes.append(_hash(source))
        allowed = " ".join(f"'{value}'" for value in hashes)
        return {
            "figures": in_script(self.figures) if self.figures else None,
            "script": Markup(scripts),
            "plotly": Markup(packed),
            "policy": f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'",
        }


def in_script(value: Any) -> Markup:
    """JSON for a ``<script>`` element, which can't end the element or open a comment.

    Raises:
        ValueError: it contains NaN or an infinity.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@lru_cache(maxsize=1)
def plotly() -> tuple[str, str]:
    """plotly's bundle from its Python package, as text and compressed (gzip, base64)."""
    source = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return source.decode("utf-8"), base64.b64encode(gzip.compress(source, 9, mtime=0)).decode("ascii")


@cache
def environment() -> Environment:
    """Jinja2 with automatic escaping and the templates' filters; cached, so that templates are compiled once."""
    made = Environment(
        loader=PackageLoader("ecoflap.report"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=formats.percent,
        duration=formats.duration,
        size=formats.size,
        integer=formats.integer,
        scientific=formats.scientific,
        significant=formats.significant,
        breakable=breakable,
        plain=plain,
        without_places=text_without_places,
    )
    made.globals.update(missing=formats.MISSING)
    return made


def breakable(name: str) -> Markup:
    """An escaped dotted or slashed name with possible line breaks after its separators and underscores."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(visible(name)))))


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _page_script() -> str:
    folder = files("ecoflap.report").joinpath("templates")
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
