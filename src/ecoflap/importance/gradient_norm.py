"""The norm of each matrix's loss gradient, exactly: what the zeroth order estimates, by one backward pass a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ecoflap.importance.first_order import FirstOrder
from ecoflap.importance.probe import Key, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.network.parts import Anatomy


@dataclass(frozen=True)
class GradientNorm:
    """√(2/π)·‖∇L‖₂ of each matrix, the mean of the zeroth-order estimate (Sung et al. 2024, section 3.2) without noise.

    Attributes:
        recompute: as in :class:`~ecoflap.importance.first_order.FirstOrder`.
    """

    scatter: ClassVar[float] = 0.0  # between batches alone

    recompute: bool = True

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        return self._first_order().upcast(anatomy)

    def steps(self, context: ProbeContext) -> int:
        return self._first_order().steps(context)

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One a batch."""
        return self._first_order().pieces(context)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value a (layer, batch); 0 for a layer that the loss does not depend on."""
        return self._first_order().estimates(context)

    def _first_order(self) -> FirstOrder:
        return FirstOrder(variant="norm", recompute=self.recompute)
