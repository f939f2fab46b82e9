"""Several workers in one process: threads that tell each other things as processes would, in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ecoflap.support.processes import pack, unpack
from ecoflap.support.workers import ALONE, Workers

T = TypeVar("T")
PATIENCE = 300  # seconds that a worker waits for others; the machine may do other work


@dataclass
class _Room:
    """What the workers share."""

    count: int
    barrier: threading.Barrier
    said: list[Any] = field(default_factory=list)
    letters: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    posted: threading.Condition = field(default_factory=threading.Condition)


@dataclass(frozen=True)
class Thread(Workers):
    room: Any = None

    def _all(self, value: Any) -> list[Any]:
        self.room.said[self.rank] = value
        self.room.barrier.wait()
        found = list(self.room.said)
        self.room.barrier.wait()
        return found

    def gather(self, tree: Any) -> list[Any]:
        return [unpack(data) for data in self._all(pack(tree))]

    def broadcast(self, tree: Any) -> Any:
        return unpack(self._all(pack(tree) if self.first else b"")[0])

    def copy_from(self, tensor: torch.Tensor, source: int) -> None:
        found = self._all(tensor.clone() if self.rank == source else None)[source]
        assert found.shape == tensor.shape
        assert found.dtype == tensor.dtype
        tensor.copy_(found)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        with self.room.posted:
            self.room.letters.setdefault((self.rank, to), []).append(tensor.clone())
            self.room.posted.notify_all()

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        letters = self.room.letters
        with self.room.posted:
            assert self.room.posted.wait_for(lambda: letters.get((source, self.rank)), timeout=PATIENCE)
            tensor.copy_(letters[(source, self.rank)].pop(0))


def together(count: int, work: Callable[[Workers], T]) -> list[T]:
    """What ``work`` returns to each of ``count`` workers; the first error of any of them is raised."""
    if count == 1:
        return [work(ALONE)]
    room = _Room(count, threading.Barrier(count, timeout=PATIENCE), [None] * count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, count, rank, room))
        except BaseException as error:  # told below
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results
