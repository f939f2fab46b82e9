"""A journal in memory: what a measurement keeps, interrupted where a test wants it."""

from __future__ import annotations

from collections.abc import Iterable

from ecoflap.importance.scores import Estimate


class Journal:
    """Begins with the estimates ``known``; raises KeyboardInterrupt when it holds ``stop_after``."""

    def __init__(self, known: Iterable[Estimate] = (), stop_after: int | None = None) -> None:
        self.kept, self.stop_after = list(known), stop_after

    def estimates(self) -> list[Estimate]:
        return list(self.kept)

    def append(self, estimate: Estimate) -> None:
        self.kept.append(estimate)
        if self.stop_after is not None and len(self.kept) >= self.stop_after:
            raise KeyboardInterrupt

    def values(self) -> dict[tuple[str, int, int], float]:
        """Of each layer, batch and draw."""
        return {(e.layer, e.batch, e.draw): e.value for e in self.kept}
