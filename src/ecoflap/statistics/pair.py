"""Defines the joint statistics of a layer's inputs in the dense model and in the model that is pruned before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ecoflap.statistics.inputs import GRAM_PART, InputGram, exact_products


class InputPair(InputGram):
    """H = 2/n X̂ᵀX̂ and C = 2/n XᵀX̂ of inputs X of the dense model and X̂ of the pruned one, token by token.

    With them, a layer's outputs can be fitted to those of the dense model: ‖X Wᵀ − X̂ Ŵᵀ‖² is
    tr(Ŵ H Ŵᵀ) − 2 tr(W C Ŵᵀ) plus a constant (asymmetric calibration; GPTAQ, Li et al. 2025, arXiv 2504.02692).
    The methods of :class:`InputGram` refer to X̂.

    Args:
        columns: width of the layer's input.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(columns)
        self._sum = torch.zeros(2, columns, columns)  # X̂ᵀX̂ and XᵀX̂ in one tensor, so that workers send both

    def update(self, x: Tensor, keep: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Add inputs ``x`` (..., columns) of the pruned model.

        Args:
            keep: True for tokens that count, in the leading dimensions of ``x``, or flat.
            dense: the same tokens' inputs in the dense model, in the shape of ``x``; None: they are ``x``.

        Raises:
            NonFiniteLoss: a token that counts holds NaN or infinity; the statistic is then spoilt.
            ValueError: shapes don't match.
        """
        if dense is not None and dense.shape != x.shape:
            raise ValueError(f"inputs of the dense model have shape {tuple(dense.shape)}, not {tuple(x.shape)}")
        pruned = self._tokens_of(x, keep)
        before = pruned if dense is None else self._tokens_of(dense, keep)
        rows = self._rows(GRAM_PART * self.columns)
        with exact_products(pruned):
            for part, target in zip(torch.split(pruned, rows), torch.split(before, rows), strict=True):
                part = part.float()
                self._sum[0].addmm_(part.T, part)
                self._sum[1].addmm_(target.float().T, part)
        self._shared.clear()
        self._counted(len(pruned))

    def _squares(self) -> Tensor:
        return torch.stack([self._sum[0].diagonal(), self._sum[1].sum(dim=1)])

    @property
    def moments(self) -> Tensor:
        """(columns, columns) fp32: X̂ᵀX̂. Don't write to it."""
        return self._sum[0]

    @property
    def cross(self) -> Tensor:
        """(columns, columns) fp32: XᵀX̂, rows for the dense model's inputs. Don't write to it."""
        return self._sum[1]
