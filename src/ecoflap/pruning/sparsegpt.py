"""SparseGPT: removes weights and updates the others to compensate (Frantar & Alistarh 2023, arXiv 2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Pattern, check_fits, with_default
from ecoflap.errors import CalibrationError, NonFiniteLoss
from ecoflap.pruning.criteria import BlockOrder, Pruned, check_order, check_statistics, zero_out
from ecoflap.pruning.masks import lowest_by_counts, lowest_in_rows, row_quotas
from ecoflap.statistics.inputs import InputGram, InputStatistics, all_finite
from ecoflap.support.ranges import check_count, check_positive

# Inside a slab, single columns update only the next few; the rest of the slab is updated by one matmul.
_STRIP = 32


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgeon, column by column: score = (w_ij / U_jj)² with UᵀU = H⁻¹ (algorithm 1 of the paper).

    Args:
        damping: share of mean(diag H) that is added to H's diagonal.
        slab: number of columns whose mask is chosen together; zeros are divided evenly among the slabs.
        order: see :attr:`ecoflap.pruning.criteria.Criterion.order`.
    """

    damping: float = 0.01
    slab: int = 128
    order: BlockOrder = "block"
    name: ClassVar[str] = "sparsegpt"
    statistics: ClassVar[Literal["gram"]] = "gram"
    default_compare: ClassVar[Literal["matrix"]] = "matrix"

    def __post_init__(self) -> None:
        check_positive("damping", self.damping)
        check_count("slab", self.slab, most=2**31)
        check_order(self.order)

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Prune ``weight`` (out, in) to ``zeros`` zeros; see :class:`ecoflap.pruning.criteria.Criterion`."""
        rows, columns = weight.shape
        check_fits(pattern, (rows, columns), zeros)
        weight = weight.detach()
        if zeros in (0, weight.numel()):
            return zero_out(weight, torch.full_like(weight, zeros == 0, dtype=torch.bool))
        gram = check_statistics(self.name, statistics, columns)
        if not isinstance(gram, InputGram):
            raise CalibrationError("criterion 'sparsegpt' needs an InputGram, not only column norms")
        factor = gram.inverse_factor(self.damping).to(weight.device)
        # Columns of the weight become rows of w, so that memory that is updated together is contiguous.
        w = torch.empty((columns, rows), device=weight.device).copy_(weight.T)
        if not all_finite(w):
            raise NonFiniteLoss(
                f"a weight of shape {rows} x {columns} holds NaN or infinite values; check the checkpoint"
            )
        # Weights of a dead input have the score 0.
        scale = factor.diagonal().reciprocal().masked_fill(gram.dead.to(weight.device), 0).unsqueeze(1)
        pattern = with_default(pattern, self.default_compare)
        quotas = None
        if not isinstance(pattern, NofM) and pattern.compare == "row":
            quotas = row_quotas((w * scale).square().T, zeros)
        cut = torch.empty_like(w, dtype=torch.bool)
        slab = self.slab if not isinstance(pattern, NofM) else max(1, self.slab // pattern.group) * pattern.group
        for start in range(0, columns, slab):
            stop = min(start + slab, columns)
            inside = slice(start, stop)
            if isinstance(pattern, NofM):
                group = (pattern.group, pattern.group - pattern.kept)
            else:
                group = None
                scores = (w[inside] * scale[inside]).square_().T
                if quotas is None:
                    count = zeros * stop // columns - zeros * start // columns
                    chosen = lowest_in_rows(scores.reshape(1, -1), count).view(rows, -1)
                else:
                    chosen = lowest_by_counts(scores, quotas * stop // columns - quotas * start // columns)
                cut[inside] = chosen.T
            errors = _eliminate(w[inside], factor[inside, inside], scale[inside], cut[inside], group)
            w[stop:].addmm_(factor[inside, stop:].T, errors, alpha=-1)
            w[inside].mul_(~cut[inside]).add_(0)  # a third of masked_fill's time; adding 0 turns -0 into 0
        pruned = w.to(weight.dtype).T.contiguous()
        if not all_finite(pruned):
            raise NonFiniteLoss(f"pruning a weight of shape {rows} x {columns} left the range of {weight.dtype}")
        return Pruned(pruned, ~cut.T.contiguous())


def _eliminate(w: Tensor, factor: Tensor, scale: Tensor, cut: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Cut the columns of one slab in turn, each followed by the update of those after it within the slab, in place.

    Args:
        w: (slab, out) fp32, a view of the weight; factor: (slab, slab) the slab's part of U; scale: (slab, 1) 1/U_jj,
            0 for dead inputs; cut: (slab, out) bool; group: (M, zeros of M), then cut is chosen here, group by group.

    Returns:
        (slab, out) w_j / U_jj where cut, 0 elsewhere: the error that later slabs compensate.
    """
    size = len(w)
    strip = _STRIP if group is None else max(1, _STRIP // group[0]) * group[0]
    inverse = (1 / factor.diagonal()).tolist()
    errors = torch.empty_like(w)
    for start in range(0, size, strip):
        stop = min(start + strip, size)
        for j in range(start, stop):
            if group is not None and j % group[0] == 0:
                members = slice(j, j + group[0])
                cut[members] = lowest_in_rows((w[members] * scale[members]).square().T, group[1]).T
            error = torch.mul(w[j], cut[j], out=errors[j]).mul_(inverse[j])
            if j + 1 < stop:
                w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors
