"""Histograms of log10|x| that are filled piece by piece: no tensor is kept, and all have edges of one grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW, HIGH = -46, 40  # decades: all that fp32 can hold
FINE = 100  # bins a decade while counting: the median is known to 1.2 %
COARSE = 10  # bins a decade in the result


class LogHistogram:
    """Counts values by the logarithm of their size."""

    def __init__(self) -> None:
        self._counts = torch.zeros((HIGH - LOW) * FINE, dtype=torch.int64)
        self._zeros = 0

    def add(self, values: Tensor) -> None:
        """Count all entries of ``values`` (any shape, finite)."""
        sizes = values.detach().abs().flatten()
        sizes = sizes[sizes > 0].double()
        self._zeros += values.numel() - len(sizes)
        bins = ((sizes.log10() - LOW) * FINE).floor().long().clamp_(0, len(self._counts) - 1)
        self._counts += torch.bincount(bins, minlength=len(self._counts)).cpu()

    def to_json(self) -> dict[str, Any]:
        """``log10_edges`` (n + 1, a tenth of a decade apart), ``share`` of all values in each bin (n), ``median`` and
        ``zeros``.

        The median is that of the values that are not zero (None without any), ``zeros`` the share of exact zeros.
        Shares and zeros add up to 1.
        """
        found = int(self._counts.sum())
        total = found + self._zeros
        if not found:
            return {"log10_edges": [0.0], "share": [], "median": None, "zeros": 1.0 if total else None}
        coarse = self._counts.view(-1, FINE // COARSE).sum(dim=1)
        filled = coarse.nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1]) + 1
        return {
            "log10_edges": [round(LOW + place / COARSE, 6) for place in range(first, last + 1)],
            "share": [int(count) / total for count in coarse[first:last]],
            "median": 10 ** self._middle(found),
            "zeros": self._zeros / total,
        }

    def _middle(self, found: int) -> float:
        """log10 of the median, values being spread evenly inside their bin."""
        sums = self._counts.cumsum(0)
        place = int((sums < found / 2).sum())
        inside = (found / 2 - int(sums[place]) + int(self._counts[place])) / int(self._counts[place])
        return LOW + (place + inside) / FINE
