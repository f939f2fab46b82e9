"""AlphaPruning: a matrix with a heavy-tailed spectrum is important. Reads only the weights, no data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance.base import ImportanceMeasure, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.model.offload import read_weight
from ecoflap.support.registry import unknown

TAILS = ("half", "peak")


@dataclass(frozen=True)
class AlphaPruning(ImportanceMeasure):
    """The exponent α of a power law fitted to the largest eigenvalues of WᵀW by Hill's estimator (PL_Alpha_Hill); Lu et
    al., NeurIPS 2024, arXiv 2410.10912, section 3.

    A low α means a heavy tail, which indicates a well-trained matrix that should keep more weights. So the score is the
    highest α of all matrices minus the matrix's own α. The rule ``linear-relative`` maps it linearly, as in the paper,
    to sparsities from η(1 − τ) to η(1 + τ). A block's α is the unweighted mean over its matrices; granularity ``layer``
    is the paper's variant per matrix.

    Attributes:
        tail: where the tail begins: ``half`` takes the larger half of the eigenvalues; ``peak`` those above the peak of
            the histogram of their logarithms (the "fix-finger" of the published experiments).
        spread: τ, at least 0 and below 1; the published default is 0.3.
    """

    tail: str = "half"
    spread: float = 0.3
    rule: ClassVar[str] = "linear-relative"
    noisy: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise unknown("tail", self.tail, list(TAILS))
        if not 0 <= self.spread < 1:
            raise InvalidOption(f"spread must be at least 0 and below 1, not {self.spread}")

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value per layer: max α − α; 0 if there is no tail (all eigenvalues are equal, or all zero).

        Raises:
            NonFiniteLoss: a weight is NaN or infinite; names the layer.
        """
        if all((layer.name, 0, 0) in context.done for layer in context.layers):
            return
        alphas: dict[str, float] = {}
        for layer in context.layers:
            weight = read_weight(context.model, layer.name).float()
            if not torch.isfinite(weight).all():
                raise NonFiniteLoss(f"the weight {layer.name} holds NaN or infinite values: the checkpoint is damaged")
            eigenvalues = spectrum(weight)
            count = len(eigenvalues) // 2 if self.tail == "half" else above_peak(eigenvalues)
            alphas[layer.name] = hill(eigenvalues, count)
        highest = max((alpha for alpha in alphas.values() if math.isfinite(alpha)), default=0.0)
        for name, alpha in alphas.items():
            if (name, 0, 0) not in context.done:
                yield Estimate(name, 0, 0, max(highest - alpha, 0.0))


def spectrum(weight: Tensor) -> Tensor:
    """Eigenvalues of WᵀW that are not zero in fp32, ascending: at most min(rows, columns), fp64 on the CPU."""
    singular = torch.linalg.svdvals(weight).double().cpu()
    floor = float(singular.max()) * max(weight.shape) * torch.finfo(torch.float32).eps
    found: Tensor = singular[singular > floor].square().sort().values
    return found


def hill(eigenvalues: Tensor, count: int) -> float:
    """1 + k / Σ_{i≤k} ln(λ_{n−i+1} / λ_{n−k}), for the k = ``count`` largest of n ascending eigenvalues; infinite if
    there is no tail (fewer than two eigenvalues, or k equal to λ_{n−k})."""
    count = min(count, len(eigenvalues) - 1)
    if count < 1:
        return math.inf
    logarithms = eigenvalues.log()
    spread = float((logarithms[-count:] - logarithms[-count - 1]).sum())
    return 1 + count / spread if spread > 0 else math.inf


def above_peak(eigenvalues: Tensor, bins: int = 100) -> int:
    """Number of eigenvalues above the lower edge of the fullest bin in a histogram of log10 λ."""
    if len(eigenvalues) < 2:
        return 0
    logarithms = eigenvalues.log10()
    low, high = float(logarithms[0]), float(logarithms[-1])
    if low == high:
        return 0
    fullest = int(torch.histc(logarithms, bins, min=low, max=high).argmax())
    edge = low + (high - low) * fullest / bins
    return int((logarithms > edge).sum())
