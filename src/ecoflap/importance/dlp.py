"""DLP: a block is the less important, the higher the median product of weight and input norm is in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecoflap.importance.dense_scores import check_range, check_scope, one_each
from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate


@dataclass(frozen=True)
class Dlp:
    """Chen et al., "DLP", ICML 2025, arXiv 2505.23807, section 3: U_l is the median of |W_ij|·‖X_j‖₂ in block l, ‖X_j‖₂
    over all calibration tokens of the dense model; the score is 1 − U_l / Σ_m U_m.

    The paper takes U for how unimportant a block is: a high median, and the block keeps less. The rule ``linear`` maps
    scores to sparsities in a band 2α wide whose mean is the target. Medians of towers with other numbers of tokens or
    other scales of weights can't be compared: with several towers, take ``budget="tower"``.

    Attributes:
        scope: ``block`` takes the median over all matrices of a transformer block, as published; ``layer`` over each
            matrix, for granularity ``layer``.
        spread: α, from 0 to 1; the published choice is 0.15.
    """

    scope: str = "block"
    spread: float = 0.15
    rule: ClassVar[str] = "linear"
    noisy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_range("spread", self.spread, 0, 1)

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value a layer, its block's; after one pass of the dense model over the batches."""
        return one_each(context, self.scope, lower_median, relative_importance)


def lower_median(products: Tensor) -> float:
    """The median of a flat tensor; of an even number the lower of the two in the middle, as in the published code."""
    return float(products.median())


def relative_importance(medians: Mapping[str, float]) -> Mapping[str, float]:
    """1 − U / ΣU for each; 1 where all are zero."""
    whole = math.fsum(medians.values())
    return {name: 1 - (median / whole if whole else 0.0) for name, median in medians.items()}
