"""Analyses of a run: computed from its directory, kept as JSON beside pictures of them (``ecoflap analyse``)."""

from __future__ import annotations

from ecoflap.analysis.names import ANALYSES
from ecoflap.analysis.perform import Outcome, analyse

__all__ = ["ANALYSES", "Outcome", "analyse"]
