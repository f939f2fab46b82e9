"""Which of the tokens that a router sent to an expert are real: found again by their content."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # numbers hashed at a time


def row_hashes(x: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row of ``x`` (tokens, features): (tokens,) int64.

    Sums of products with fixed odd numbers modulo 2⁶⁴: no rounding, so that a copied row has the same hash wherever
    it stands. Two unlike rows share one with a chance of about 2⁻⁶³.
    """
    x = x.detach().contiguous()
    words = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (words.shape[1],), generator=generator) * 2 + 1
    factors = factors.to(x.device)
    rows = max(1, _CHUNK // max(1, words.shape[1]))
    return torch.cat([(part.to(torch.int64) * factors).sum(1) for part in torch.split(words, rows)])


class RoutedTokens:
    """The tokens that entered a mixture, real and padded, of one call.

    Args:
        x: (..., features), what the mixture received.
        real: bool, the leading dimensions of ``x``, True = real.
    """

    def __init__(self, x: Tensor, real: Tensor) -> None:
        hashes = row_hashes(x.reshape(-1, x.shape[-1]))
        self._all, self._real = hashes, hashes[real.reshape(-1)]

    def real_among(self, x: Tensor) -> Tensor | None:
        """(tokens,) bool: which rows of ``x`` (tokens, features) are copies of real tokens.

        None if some row is no copy of any token, because the mixture scales what it routes: nothing is known then.
        """
        hashes = row_hashes(x.reshape(-1, x.shape[-1]))
        if not torch.isin(hashes, self._all).all():
            return None
        return torch.isin(hashes, self._real)
