"""The table of analyses: a new one is one file and one line here. Those that read files alone come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecoflap.registry import Registry

if TYPE_CHECKING:
    from ecoflap.analysis.parts import Analysis

ANALYSES: Registry[Analysis] = Registry(
    "analysis",
    {
        "importance": "ecoflap.analysis.importance:ANALYSIS",
        "allocation": "ecoflap.analysis.allocation:ANALYSIS",
        "before-after": "ecoflap.analysis.before_after:ANALYSIS",
        "distributions": "ecoflap.analysis.distributions:ANALYSIS",
        "agreement": "ecoflap.analysis.agreement:ANALYSIS",
        "effects": "ecoflap.analysis.effects:ANALYSIS",
        "landscape": "ecoflap.analysis.landscape:ANALYSIS",
    },
)
