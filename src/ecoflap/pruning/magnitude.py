"""Magnitude: removes the smallest weights; the baseline that needs no calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ecoflap.allocation.patterns import Pattern, with_default
from ecoflap.pruning.criteria import Pruned, zero_out
from ecoflap.pruning.masks import lowest_mask
from ecoflap.statistics.inputs import InputStatistics


@dataclass(frozen=True)
class Magnitude:
    """score = |W_ij|, by default compared over the whole matrix (Han et al. 2015, arXiv 1506.02626)."""

    name: ClassVar[str] = "magnitude"
    statistics: ClassVar[Literal["none"]] = "none"
    order: ClassVar[Literal["block"]] = "block"
    default_compare: ClassVar[Literal["matrix"]] = "matrix"

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Prune ``weight`` (out, in) to ``zeros`` zeros; see :class:`ecoflap.pruning.criteria.Criterion`."""
        scores = weight.detach().float().abs()
        return zero_out(weight.detach(), lowest_mask(scores, zeros, with_default(pattern, self.default_compare)))
