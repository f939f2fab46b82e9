"""ADMM: finds mask and weights together by alternating least squares and projection (Boža 2024, arXiv 2401.02938)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ecoflap.allocation.patterns import Compare, Pattern, check_fits, with_default
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.pruning.criteria import BlockOrder, Needs, Pruned, check_order, check_statistics, make_criterion, zero_out
from ecoflap.pruning.least_squares import Reconstruction, Targets
from ecoflap.pruning.masks import gradual_mask
from ecoflap.pruning.sparsegpt import SparseGPT
from ecoflap.statistics.inputs import InputGram, InputStatistics
from ecoflap.statistics.pair import InputPair
from ecoflap.support.ranges import check_count, check_positive

_CHOOSING = 0.75  # share of the iterations in which the mask may change
_SMALL = 4096  # up to this number of weights, the better mask of ADMM's and SparseGPT's is taken


@dataclass(frozen=True)
class ADMM:
    """Alternating direction method of multipliers with a growing mask, then least squares on the last one.

    Minimises ‖X Wᵀ − X̂ Ŵᵀ‖² over the weights Ŵ with the given number of zeros: X are the layer's inputs in the dense
    model, X̂ those in the model pruned so far. Scaling, penalty and mask as in Boža's paper; the final conjugate
    gradients as in ALPS (Meng et al. 2024, arXiv 2406.07831).

    Args:
        iterations: of ADMM. In the first three quarters each iteration chooses the mask again, with more zeros.
        damping: added to the diagonal of X̂ᵀX̂, which is scaled to 1; keeps the weights near the dense ones.
        penalty: ρ of ADMM, in the same units: how close an iteration stays to the masked weights.
        polish: steps of conjugate gradients on the final mask.
        targets: "dense": the layer's outputs in the dense model. "own": the outputs of the dense weight for the inputs
            of the pruned model (X = X̂), as in SparseGPT.
        mask: a criterion that chooses the mask; ADMM then only finds the weights.
        order: see :attr:`ecoflap.pruning.criteria.Criterion.order`.
    """

    iterations: int = 20
    damping: float = 0.01
    penalty: float = 1.0
    polish: int = 10
    targets: Targets = "dense"
    mask: str = ""
    order: BlockOrder = "sequential"
    name: ClassVar[str] = "admm"

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_positive("damping", self.damping)
        check_positive("penalty", self.penalty)
        check_count("polish", self.polish, least=0)
        if self.targets not in ("dense", "own"):
            raise InvalidOption(f"targets must be 'dense' or 'own', not {self.targets!r}")
        check_order(self.order)
        if self.mask and not hasattr(self._chooser(), "statistics"):
            raise InvalidOption(f"mask must be a criterion that prunes layer by layer, not {self.mask!r}")

    @property
    def statistics(self) -> Needs:
        """See :class:`ecoflap.pruning.criteria.Criterion`."""
        return "pair" if self.targets == "dense" else "gram"

    @property
    def default_compare(self) -> Compare:
        """See :class:`ecoflap.pruning.criteria.Criterion`."""
        return self._chooser().default_compare if self.mask else "matrix"

    def _has_error_to_correct(self, statistics: InputStatistics | None) -> bool:
        """Whether a layer that keeps all its weights can correct an error of its inputs."""
        return self.targets == "dense" and isinstance(statistics, InputPair)

    def _chooser(self) -> Any:
        return make_criterion(self.mask)

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Prune ``weight`` (out, in) to ``zeros`` zeros; see :class:`ecoflap.pruning.criteria.Criterion`."""
        weight = weight.detach()
        check_fits(pattern, (weight.shape[0], weight.shape[1]), zeros)
        if zeros == weight.numel() or (zeros == 0 and not self._has_error_to_correct(statistics)):
            return zero_out(weight, torch.full_like(weight, zeros == 0, dtype=torch.bool))
        gram = check_statistics(self.name, statistics, weight.shape[1])
        if not isinstance(gram, InputGram):
            raise CalibrationError("criterion 'admm' needs an InputGram, not only column norms")
        pattern = with_default(pattern, self.default_compare)
        layer = Reconstruction.of(weight, gram, self.damping, self.targets)
        mask = self._chooser()(weight, gram, zeros, pattern).mask if self.mask else None
        inverse = gram.shared(
            ("penalised inverse", self.damping, self.penalty), lambda: _inverse(layer.moments, self.penalty)
        )
        w, mask = _admm(layer, inverse.to(weight.device), zeros, pattern, self, mask)
        w = layer.solve(w, mask, self.polish)
        if not self.mask and weight.numel() <= _SMALL:
            other = SparseGPT()(weight, gram, zeros, pattern)
            by_sparsegpt = layer.solve(other.weight.float() * layer.scale, other.mask, self.polish)
            if layer.error(by_sparsegpt) < layer.error(w):
                w, mask = by_sparsegpt, other.mask
        return layer.pruned(w, mask, weight)


def _admm(
    layer: Reconstruction, inverse: Tensor, zeros: int, pattern: Pattern, options: ADMM, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scaled weight and mask after all iterations; a given ``mask`` is not changed.

    In the paper's terms, with S = W + U: Z = mask ⊙ S, U = S − Z, and W = (B + ρ (Z − U)) (H + ρI)⁻¹.
    """
    iterations = options.iterations
    choosing = 0 if mask is not None else max(1, round(_CHOOSING * iterations))
    constant = layer.products @ inverse
    s = layer.weight.clone()
    sign = torch.empty_like(s)  # 1 where the mask keeps, -1 where it does not: Z - U = sign ⊙ S
    for iteration in range(1, iterations + 1):
        if iteration <= choosing:
            # A cubic schedule for the number of zeros (Zhu & Gupta 2017, arXiv 1710.01878).
            share = 1 - (1 - iteration / choosing) ** 3
            mask = gradual_mask(s.abs(), round(share * zeros), zeros, pattern)
        assert mask is not None
        if iteration <= max(choosing, 1):
            sign.copy_(mask).mul_(2).sub_(1)
        difference = s * sign
        w = torch.addmm(constant, difference, inverse, alpha=options.penalty)
        s = w.add_(s.sub_(difference), alpha=0.5)  # U = (S - sign ⊙ S) / 2, exactly
    assert mask is not None
    return s.mul_(mask), mask


def _inverse(moments: Tensor, penalty: float) -> Tensor:
    """(H + ρI)⁻¹; well conditioned, since the eigenvalues of H are between 0 and the number of inputs."""
    penalised = moments.clone()
    penalised.diagonal().add_(penalty)
    lower, failed = torch.linalg.cholesky_ex(penalised)
    if failed:
        raise CalibrationError("the inputs' second moments can't be inverted; use more calibration samples")
    return torch.cholesky_inverse(lower)
