"""How pictures of analyses look: one style, colours that the colour-blind tell apart, panels a tower."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)
MODALITY = {"vision": BLUE, "language": ORANGE, "bridge": GREEN}
DENSE, PRUNED = BLUE, ORANGE
_STYLE = {
    "svg.hashsalt": "ecoflap",  # the same analysis gives the same bytes
    "svg.fonttype": "none",  # text stays text, and the file small
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """The style, for making a figure and for saving it; a letter that the font lacks is no reason to complain."""
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def panels(rows: int, columns: int, width: float = 3.2, height: float = 2.4) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` × ``columns`` axes, each so many inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 4.0), height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def colour_of(modality: str) -> str:
    """A tower's colour."""
    return MODALITY.get(modality, GREY)


def title_of(tower: str, modality: str) -> str:
    """A tower's title: short enough for a panel."""
    short = tower if len(tower) <= 34 else "…" + tower[-33:]
    return f"{short} ({modality})" if modality else short


def shown_ticks(count: int, most: int = 12) -> Sequence[int]:
    """At most about ``most`` of the positions 0 to ``count`` - 1, evenly spaced from 0."""
    return range(0, count, max(1, -(-count // most)))
