"""Rounds nonzeros to 8 or 4 bits, with a float32 scale for each row or group of its columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption

CODE_ZERO = 15  # int4: a code c from 0 to 15 means (2 c - 15) · scale, which is never 0
_LEAST, _STEPS = 0.4, 25  # int4: steps of the grid of scales, from this share of the scale for the largest weight to 1
_TINY = torch.finfo(torch.float32).tiny

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]


def rounded(matrix: Tensor, values: str, group_size: int) -> tuple[Tensor, Tensor]:
    """(R, C) codes and (R, groups) float32 scales of a matrix; codes are int8, or uint8 with 4 bits.

    Args:
        matrix: (R, C), of a floating dtype.
        values: "int8" or "int4".
        group_size: columns that share a scale; 0: all of a row.

    Raises:
        InvalidOption: a weight is not finite.
    """
    rows, columns = matrix.shape
    size = group_size or max(columns, 1)
    groups = max(1, -(-columns // size))
    scales = torch.ones(rows, groups, device=matrix.device)
    codes = torch.empty(rows, columns, dtype=torch.int8 if values == "int8" else torch.uint8, device=matrix.device)
    rounding: Rounding = _to_int8 if values == "int8" else _to_int4
    for group in range(groups):
        place = slice(group * size, (group + 1) * size)
        part = matrix[:, place].float()
        if not part.numel():
            continue
        if not bool(torch.isfinite(part).all()):
            raise InvalidOption(f"weights that are not finite can't be rounded to {values}")
        codes[:, place], scales[:, group] = rounding(part)
    return codes, scales


def meaning(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of codes; ``scales`` has one for each code."""
    return (codes.float() if codes.dtype == torch.int8 else 2 * codes.float() - CODE_ZERO) * scales


def _to_int8(part: Tensor) -> tuple[Tensor, Tensor]:
    """w ≈ q s with s = max |w| / 127."""
    scale = _positive(part.abs().amax(dim=1) / 127)
    return (part / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _to_int4(part: Tensor) -> tuple[Tensor, Tensor]:
    """w ≈ (2 c - 15) s with the s of a grid that minimises Σ (w - ŵ)² over the nonzeros; then s by least squares.

    The 16 levels ±s, ±3 s, … ±15 s contain no zero, which the mask represents. Clipping the largest weights costs less
    than coarser steps for all (clipping by squared error, as usual below 8 bits).
    """
    kept = part != 0
    largest = part.abs().amax(dim=1)
    best = _positive(largest / CODE_ZERO, _TINY)
    error = _error(part, kept, best)
    for step in range(_STEPS):
        tried = _positive(largest * (_LEAST + (1 - _LEAST) * step / _STEPS) / CODE_ZERO, _TINY)
        best, error = _better(part, kept, tried, best, error)
    odd = meaning(_codes(part, best), torch.ones_like(part)) * kept
    fitted = (part * odd).sum(dim=1) / odd.square().sum(dim=1).clamp(min=1)  # argmin of Σ (w - odd s)² in s
    best, error = _better(part, kept, _positive(fitted, _TINY), best, error)
    return _codes(part, best), best


def _better(part: Tensor, kept: Tensor, tried: Tensor, best: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    found = _error(part, kept, tried)
    return torch.where(found < error, tried, best), torch.minimum(found, error)


def _error(part: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    return ((meaning(_codes(part, scale), scale[:, None]) - part) * kept).square().sum(dim=1)


def _codes(part: Tensor, scale: Tensor) -> Tensor:
    return ((part / scale[:, None] + CODE_ZERO) / 2).round().clamp(0, CODE_ZERO).to(torch.uint8)


def _positive(scale: Tensor, least: float = 1.0) -> Tensor:
    """``scale``, or ``least`` if it is zero or underflows."""
    return torch.where(scale > 0, scale, torch.full_like(scale, least))
