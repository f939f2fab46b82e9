"""OWL: a block is as important as its share of outliers, weights whose product with their input's norm stands out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.dense_scores import check_range, check_scope, one_each
from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate


@dataclass(frozen=True)
class Owl:
    """The layerwise outlier distribution of Yin et al., ICML 2024, arXiv 2310.05175, section 3: the share of the
    products A_ij = |W_ij|·‖X_j‖₂ above M times their mean, ‖X_j‖₂ being over all calibration tokens of the dense model.

    A block keeps the more the higher its share: the rule ``linear`` maps the shares to sparsities in a band 2λ wide
    whose mean is the target.

    Attributes:
        multiple: M; the paper's choice is 5 (and 7 for some models).
        scope: ``block`` takes mean and count over all matrices of a transformer block, as published; ``layer`` over
            each matrix, for granularity ``layer``.
        spread: λ, from 0 to 1; the published choice is 0.08.
    """

    multiple: float = 5.0
    scope: str = "block"
    spread: float = 0.08
    rule: ClassVar[str] = "linear"
    noisy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.multiple > 0:
            raise InvalidOption(f"multiple must be a positive number, not {self.multiple}")
        check_scope(self.scope)
        check_range("spread", self.spread, 0, 1)

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value a layer, its block's; after one pass of the dense model over the batches."""
        return one_each(context, self.scope, lambda products: outlier_share(products, self.multiple), dict)


def outlier_share(products: Tensor, multiple: float) -> float:
    """Share of the entries of ``products`` (flat, non-negative) that are above ``multiple`` times their mean."""
    return int((products > multiple * products.mean()).sum()) / products.numel()
