"""Fits the weights for a given mask: least squares on the layer's outputs, by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ecoflap.errors import NonFiniteLoss
from ecoflap.pruning.criteria import Pruned
from ecoflap.statistics.inputs import InputGram, all_finite
from ecoflap.statistics.pair import InputPair

Targets = Literal["dense", "own"]


@dataclass(frozen=True)
class Reconstruction:
    """Finds a sparse Ŵ such that X̂ Ŵᵀ is near X Wᵀ: minimises tr(Ŵ H Ŵᵀ) − 2 tr(B Ŵᵀ).

    H = X̂ᵀX̂ + damping and B = W XᵀX̂ + damping · W, scaled so that every input has norm one: column j of the weight is
    multiplied by d_j = ‖X̂_j‖, and H has a constant diagonal, so that a Jacobi preconditioner would have no effect.
    Damping keeps the solution near the dense weight.

    Attributes:
        weight: (out, in) fp32, the dense weight W, scaled.
        moments: (in, in) fp32, H, scaled; layers with the same input share it: don't write to it.
        products: (out, in) fp32, B, scaled.
        scale: (in,) fp32, d; 0 for dead inputs, whose weights are 0 here.
    """

    weight: Tensor
    moments: Tensor
    products: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: InputGram, damping: float, targets: Targets = "dense") -> Reconstruction:
        """The problem of ``weight`` (out, in) with the statistics of its inputs.

        Args:
            targets: "dense": X are the dense model's inputs, if ``gram`` is an :class:`InputPair` that has them.
                "own": X is X̂.
            damping: added to the scaled H's diagonal, which is 1.

        Raises:
            NonFiniteLoss: the weight is not finite.
        """
        w = weight.detach().to(torch.float32, copy=True)
        if not all_finite(w):
            raise NonFiniteLoss(
                f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values; check the checkpoint"
            )
        moments = gram.shared(("scaled moments", damping), lambda: _scaled(gram, damping)).to(w.device)
        scale = gram.norm.to(w.device)
        if targets == "dense" and isinstance(gram, InputPair):
            products = (w @ gram.cross.to(w.device)).mul_(_inverse(scale))
            w.mul_(scale)
            products.add_(w, alpha=damping)
        else:
            w.mul_(scale)
            products = w @ moments
        return cls(w, moments, products, scale)

    def error(self, w: Tensor) -> float:
        """The objective at a scaled weight (out, in); 0 for a zero weight, negative for a better one."""
        return float((w @ self.moments).sub_(self.products, alpha=2).mul_(w).sum(dtype=torch.float64))

    def solve(self, w: Tensor, mask: Tensor, steps: int) -> Tensor:
        """A better scaled weight than ``w`` with the same mask, by conjugate gradients for all rows at once.

        Minimises over the weights that ``mask`` (out, in) keeps; in exact arithmetic, a row with k kept weights reaches
        the minimum in k steps.

        Args:
            w: (out, in), zero where ``mask`` is False.
        """
        w, kept = w.clone(), mask.to(w.dtype)  # products with floats are faster than with bools
        residual = (self.products - w @ self.moments).mul_(kept)
        direction = residual.clone()
        square = residual.square().sum(dim=1, keepdim=True)
        solved = (
            square * torch.finfo(square.dtype).eps ** 2
        )  # below this, residuals are only rounding errors, which may grow
        for _ in range(steps):
            image = (direction @ self.moments).mul_(kept)
            curvature = (direction * image).sum(dim=1, keepdim=True)
            length = torch.where((square > solved) & (curvature > 0), square / curvature, 0)
            w.addcmul_(direction, length)
            residual.addcmul_(image, length, value=-1)
            before, square = square, residual.square().sum(dim=1, keepdim=True)
            direction.mul_(torch.where(before > 0, square / before, 0)).add_(residual)
        return w

    def pruned(self, w: Tensor, mask: Tensor, dense: Tensor) -> Pruned:
        """A scaled weight in the units and dtype of ``dense``; weights of dead inputs are those of ``dense``.

        Raises:
            NonFiniteLoss: a weight is too large for the dtype.
        """
        weight = torch.where(self.scale > 0, w * _inverse(self.scale), dense).mul_(mask).add_(0)  # no -0
        weight = weight.to(dense.dtype)
        if not all_finite(weight):
            raise NonFiniteLoss(f"pruning a weight of shape {tuple(dense.shape)} left the range of {dense.dtype}")
        return Pruned(weight, mask)


def _scaled(gram: InputGram, damping: float) -> Tensor:
    """(in, in) H with columns of norm one, plus the damping; rows and columns of dead inputs have only the damping."""
    inverse = _inverse(gram.norm)
    moments = (gram.moments * inverse).mul_(inverse.unsqueeze(1))
    moments.diagonal().copy_(torch.where(gram.dead, damping, 1 + damping))
    return moments


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)
