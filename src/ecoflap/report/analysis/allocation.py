"""Draws the allocation as a heat map, block by kind of matrix, one panel for each tower, from ``allocation.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ecoflap.report.analysis.registry import Analysis, NotApplicable
from ecoflap.report.charts.run import heat_charts
from ecoflap.report.charts.static import picture
from ecoflap.report.data import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """Sparsity by colour, with numbers if there is space."""
    charts = heat_charts(read_run(subject.path))
    if not charts:
        raise NotApplicable("the run has no allocation")
    return {"": picture([[chart] for chart in charts], "sparsity of each matrix, in per cent")}


ANALYSIS = Analysis(draw)
