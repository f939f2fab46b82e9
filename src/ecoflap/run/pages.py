"""Registers the functions that write pages and cards by name, so that ``run`` need not import ``report``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ecoflap.support.registry import Registry

PAGES: Registry[Callable[[Path], object]] = Registry(
    "page",
    {
        "card": "ecoflap.report.card:write_card",
        "report": "ecoflap.report.page:write_report",
        "finetune": "ecoflap.report.finetune_page:write_finetune",
        "compare-plots": "ecoflap.report.charts.compare:draw_comparison",
        "compare": "ecoflap.report.compare_page:write_compare",
    },
)
