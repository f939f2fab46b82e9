"""Registers the analyses: a new one is one file and one line here. Those that only read files come first.

An analysis is two functions: from a run to JSON, and from that JSON to drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ecoflap.support.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject

ANALYSES: Registry[Analysis] = Registry(
    "analysis",
    {
        "importance": "ecoflap.report.analysis.importance:ANALYSIS",
        "allocation": "ecoflap.report.analysis.allocation:ANALYSIS",
        "before-after": "ecoflap.report.analysis.before_after:ANALYSIS",
        "distributions": "ecoflap.report.analysis.distributions:ANALYSIS",
        "agreement": "ecoflap.report.analysis.agreement:ANALYSIS",
        "effects": "ecoflap.report.analysis.effects:ANALYSIS",
        "landscape": "ecoflap.report.analysis.landscape:ANALYSIS",
    },
)


class NotApplicable(Exception):
    """The analysis can't be made for this run; the message says what is missing."""


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        draw: ``draw(data, subject)`` gives drawings by the suffix of their file names ("" for a single one). It may
            raise :class:`NotApplicable`.
        compute: ``compute(subject)`` gives the content of its JSON file, with only finite numbers or None. Without it,
            the analysis uses the run's own files, and ``data`` is an empty mapping.
    """

    draw: Callable[[Mapping[str, Any], Subject], Mapping[str, Figure]]
    compute: Callable[[Subject], dict[str, Any]] | None = None
