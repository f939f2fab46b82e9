"""Turns the scores of the layers into an exact number of zeros for each layer, in integers and fractions.

Budgets, groups, caps and rounding are the same for every rule; a rule turns scores into shares. See
docs/allocation.md. Imports only ``support`` and ``errors``, and no torch.
"""

from ecoflap.allocation.allocate import allocate
from ecoflap.allocation.checks import AGGREGATES, BUDGETS, GRANULARITIES
from ecoflap.allocation.groups import LayerSize
from ecoflap.allocation.parts import Allocation, LayerAllocation, SearchRecord
from ecoflap.allocation.rules import RULES

__all__ = [
    "AGGREGATES",
    "BUDGETS",
    "GRANULARITIES",
    "RULES",
    "Allocation",
    "LayerAllocation",
    "LayerSize",
    "SearchRecord",
    "allocate",
]
