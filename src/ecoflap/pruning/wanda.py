"""Wanda: removes the weights with the lowest |weight| × input norm (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ecoflap.allocation.patterns import Pattern, with_default
from ecoflap.pruning.criteria import BlockOrder, Pruned, check_order, check_statistics, zero_out
from ecoflap.pruning.masks import lowest_mask
from ecoflap.statistics.inputs import InputStatistics


@dataclass(frozen=True)
class Wanda:
    """score = |W_ij| · ||X_j||_2 (equation 1 of the paper), by default compared within each output row.

    Args:
        order: see :attr:`ecoflap.pruning.criteria.Criterion.order`.
    """

    order: BlockOrder = "block"
    name: ClassVar[str] = "wanda"
    statistics: ClassVar[Literal["norm"]] = "norm"
    default_compare: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        check_order(self.order)

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Prune ``weight`` (out, in) to ``zeros`` zeros; see :class:`ecoflap.pruning.criteria.Criterion`."""
        norm = check_statistics(self.name, statistics, weight.shape[1]).norm.to(weight.device)
        scores = weight.detach().to(torch.float32, copy=True).abs_().mul_(norm)
        return zero_out(weight.detach(), lowest_mask(scores, zeros, with_default(pattern, self.default_compare)))
