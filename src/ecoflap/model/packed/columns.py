"""Finds a factor for each column of a matrix, by which it is divided before its values are rounded.

Least squares may give a column with very small inputs weights a hundred times as large as all others. They would
determine the scale of their group, and its other weights would be rounded to almost zero. The product uses x times the
factors. Scaling a matrix on both sides before quantisation is known from AWQ (Lin et al., MLSys 2024), which takes the
factors from activations, and SINQ (Müller et al., 2025), which takes them from the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 8  # factors lie between 2^-MOST and 2^MOST, so that inputs times them stay in the range of float16
_PASSES = 3
_SHARE = 0.75  # exponent of the factors: 0 leaves the columns unchanged, 1 makes them equal
_AT_ONCE = 1 << 24  # weights that are processed at a time


def column_scales(matrix: Tensor) -> Tensor:
    """(C,) powers of two for the columns of an (R, C) matrix, in bfloat16, which holds them exactly.

    Rows and columns are divided in turn by the root mean square of their non-zeros, three times (Sinkhorn's iteration,
    on squares). The factor of a column is its divisor relative to the median column, to the power 0.75: a column with
    large weights usually has small inputs, but not always.
    """
    columns = matrix.shape[1]
    step = max(1, _AT_ONCE // max(columns, 1))
    size = torch.ones(columns, device=matrix.device)  # mean squares of columns
    for _ in range(_PASSES):
        total, counts = torch.zeros_like(size), torch.zeros_like(size)
        for low in range(0, len(matrix), step):
            squares = matrix[low : low + step].float().square()
            kept = (squares != 0).float()
            total += (1 / _positive(squares @ (1 / size) / kept.sum(dim=1).clamp(min=1))) @ squares
            counts += kept.sum(dim=0)
        size = _positive(total / counts.clamp(min=1))
    filled = size[counts > 0]
    relative = torch.where(counts > 0, size / filled.median(), torch.ones_like(size)) if len(filled) else size
    exponents = (relative.log2() * (_SHARE / 2)).round().clamp(-MOST, MOST)
    return torch.ldexp(torch.ones_like(exponents), exponents.to(torch.int32)).to(torch.bfloat16)


def _positive(size: Tensor) -> Tensor:
    """1 where a size is 0, or beyond the range of float32."""
    return torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))


def scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    """``x`` (..., C) times the factors of the columns; ``x`` without factors.

    Exact, since they are powers of two, except for float16 numbers that become subnormal.
    """
    return x if scales is None else x * scales.to(x.dtype)
