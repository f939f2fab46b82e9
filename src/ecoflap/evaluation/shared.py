"""An evaluation shared by several workers: batch by batch in turn, the results in the order of the batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ecoflap.workers import Workers

T = TypeVar("T")


class Shared(Generic[T]):
    """Results that come one by one, each made by one worker and known to all in the end.

    All workers go through the same data and call :meth:`add` as often; what a worker does not make itself it skips.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self._count = workers, 0
        self._own: list[T] = []

    def add(self, work: Callable[[], T]) -> None:
        """The next result, made by ``work`` where it is this worker's turn.

        It is of dicts, lists, strings, numbers and tensors, see :class:`ecoflap.workers.Workers`.
        """
        if self._count % self._workers.count == self._workers.rank:
            self._own.append(work())
        self._count += 1

    def all(self) -> list[T]:
        """The results of all workers, in the order of the calls of :meth:`add`; tensors lie on the CPU."""
        told = self._workers.gather(self._own)
        return [told[number % len(told)][number // len(told)] for number in range(self._count)]
