"""Describes a chart independently of how it is drawn: plotly draws it on the page, matplotlib as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal

Number = float | None
HUES = 8  # the page's colours --c1 … --c8, each with its own marker
DASHES = ("solid", "dash", "dot", "dashdot")
_MODALITIES = ("vision", "language", "bridge")


@dataclass(frozen=True)
class Style:
    """The style of one series: the page's CSS variable of its colour, the indices of its dash and marker."""

    colour: str
    dash: int = 0
    marker: int = 0


@dataclass(frozen=True)
class Axis:
    """Title, scale and limits of an axis; ``percent`` shows fractions in per cent; ``ticks`` are the positions of its
    numbers, which a logarithmic axis must have (:func:`log_ticks`)."""

    title: str
    log: bool = False
    percent: bool = False
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None

    def tick_texts(self) -> list[str]:
        """The numbers at ``ticks``."""
        return [f"{100 * tick:g}%" if self.percent else f"{tick:g}".replace("-", "−") for tick in self.ticks or ()]


@dataclass(frozen=True)
class Series:
    """One named row of values.

    ``x`` are numbers, or names for bars; ``y`` is None if nothing was measured. ``error`` is half the length of each
    error bar, ``band`` the limits (low, high) of the area around a line. ``hover`` has a text for each point. ``step``
    has one more ``x`` than ``y``: the edges of a histogram.
    """

    name: str
    kind: Literal["line", "bar", "points", "step"]
    x: Sequence[float] | Sequence[str]
    y: Sequence[Number]
    style: Style
    hover: Sequence[str] = ()
    error: Sequence[Number] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None

    def error_lengths(self, axis: Axis) -> tuple[list[float], list[float]]:
        """Lengths of the error bars below and above each point.

        On a logarithmic axis, a bar that reaches zero ends at the end of the axis.
        """
        above = [error or 0.0 for error in self.error or ()]
        if not axis.log:
            return above, above
        floor = axis.limits[0] if axis.limits else 0.0
        return [max(min(e, (y or 0.0) - floor), 0.0) for e, y in zip(above, self.y, strict=True)], above


@dataclass(frozen=True)
class Rule:
    """A horizontal line at ``value`` with its label."""

    value: float
    label: str
    dash: int


@dataclass(frozen=True)
class Heat:
    """A matrix of values: ``z[row][column]`` with colours from --card (``low``) to --heat (``high``); None is empty.

    ``diverging``: colours from --cold (``low``) through --card to --heat (``high``). ``text`` is written into cells.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    z: Sequence[Sequence[Number]]
    hover: Sequence[Sequence[str]]
    low: float
    high: float
    ends: tuple[str, str]
    text: Sequence[Sequence[str]] | None = None
    diverging: bool = False


@dataclass(frozen=True)
class Entry:
    """One entry of the legend, which shows and hides all series with its name."""

    name: str
    style: Style
    kind: str


@dataclass(frozen=True)
class Chart:
    """One plot: its caption, its text alternative, axes, and data."""

    caption: str
    description: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    rules: Sequence[Rule] = ()
    heat: Heat | None = None
    modality: str = ""
    horizontal: bool = False  # horizontal bars with their names at the left
    stacked: bool = False
    wide: bool = False  # takes the whole width of the page

    @property
    def on_bars(self) -> bool:
        """Whether there are points on bars; they get an outline in another colour."""
        return any(series.kind == "bar" for series in self.series)

    @property
    def legend(self) -> list[Entry]:
        """The series by name, if there are several."""
        entries = {series.name: Entry(series.name, series.style, series.kind) for series in self.series}
        return list(entries.values()) if len(entries) > 1 else []


def places(count: int, most: int = 12) -> list[float]:
    """At most ``most`` ticks for ``count`` items in a row."""
    return [float(place) for place in range(0, count, max(1, -(-count // most)))]


def log_ticks(limits: tuple[float, float]) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 of each decade for at most two decades, else powers of ten."""
    low, high = limits
    first, last = floor(log10(low)), ceil(log10(high))
    short = high / low <= 100
    step = 1 if short else max(1, (last - first) // 5)
    powers = range(first, last + 1, step)
    found = [float(f"{digit}e{power}") for power in powers for digit in ((1, 2, 5) if short else (1,))]
    return [tick for tick in found if low <= tick <= high]


def style(index: int) -> Style:
    """The style of the ``index``-th of many series: eight colours with their markers, then again with other dashes."""
    return Style(f"c{index % HUES + 1}", index // HUES % len(DASHES), index % HUES)


def modality_colour(modality: str) -> str:
    """The CSS variable of a modality."""
    return modality if modality in _MODALITIES else "other"


def tower_styles(modalities: Mapping[str, str]) -> dict[str, Style]:
    """Styles by tower: the colour of its modality; towers of the same modality differ in dash and marker."""
    seen: dict[str, int] = {}
    styles = {}
    for tower, modality in modalities.items():
        colour = modality_colour(modality)
        styles[tower] = Style(colour, seen.get(colour, 0) % len(DASHES), seen.get(colour, 0) % HUES)
        seen[colour] = seen.get(colour, 0) + 1
    return styles
