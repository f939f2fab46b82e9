"""No importance at all: every layer gets the target sparsity, as in plain Wanda or SparseGPT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.scores import Estimate


@dataclass(frozen=True)
class Uniform:
    """Yields nothing; the allocation knows the name and gives every layer the target sparsity."""

    def steps(self, context: ProbeContext) -> int:
        return 0

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        yield from ()
