"""Stores 4-bit codes, two in a byte.

The codes of each 64 columns begin with a new byte, so that kernels, which process 64 columns in a step, never begin in
the middle of a byte. That costs a sixteenth of a bit per weight at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # columns; a multiple of 8


def row_bytes(counts: Tensor) -> Tensor:
    """(R,) number of bytes of each row, from (R, blocks) numbers of codes in each block of columns."""
    return ((counts + 1) // 2).sum(dim=1)


def joined(codes: Tensor, kept: Tensor) -> Tensor:
    """The kept ones of (R, C) codes as bytes; the first of two codes is the lower half."""
    places, total = _places(kept)
    halves = torch.zeros(2 * total, dtype=torch.uint8, device=codes.device)
    halves[places] = codes[kept]
    return halves[0::2] | halves[1::2] << 4


def parted(stored: Tensor, kept: Tensor) -> Tensor:
    """The codes in ``stored`` for all kept places, in order."""
    places, _ = _places(kept)
    return torch.stack([stored & 15, stored >> 4], dim=1).flatten()[places]


def block_counts(kept: Tensor) -> Tensor:
    """(R, blocks) number of kept columns in each block, from (R, C) bool."""
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -columns % BLOCK))
    return padded.view(rows, -(-columns // BLOCK), BLOCK).sum(dim=2, dtype=torch.int64)


def _places(kept: Tensor) -> tuple[Tensor, int]:
    """The position of each kept column's code, in half bytes, and the total number of bytes."""
    rows, columns = kept.shape
    blocks = -(-columns // BLOCK)
    inside = torch.nn.functional.pad(kept, (0, -columns % BLOCK)).view(rows * blocks, BLOCK)
    size = (inside.sum(dim=1, dtype=torch.int64) + 1) // 2
    first = size.cumsum(0) - size
    order = inside.cumsum(dim=1) - 1
    return (2 * first[:, None] + order)[inside], int(size.sum())
