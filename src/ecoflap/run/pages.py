"""What is made of a finished folder, by name: a run knows no page, and a page knows runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ecoflap.support.registry import Registry

PAGES: Registry[Callable[[Path], object]] = Registry(
    "page",
    {
        "card": "ecoflap.report.card:write_card",
        "report": "ecoflap.report.page:write_report",
        "compare-plots": "ecoflap.report.charts.compare:draw_comparison",
        "compare": "ecoflap.report.compare_page:write_compare",
    },
)
