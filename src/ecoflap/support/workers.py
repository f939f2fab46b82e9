"""Defines workers: several processes that share one job, their parts of it, and the exchange of results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 8  # largest number of partial sums of statistics; more workers than this have no part in stage 2
T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """One process among ``count``. This base class is a single process without communication.

    All workers call the same methods in the same order. Messages are trees of dicts with string keys, lists, strings,
    numbers, None and tensors (received on the CPU); tuples are received as lists. Floats keep every bit.

    Attributes:
        rank: number of this worker; only number 0 writes files and prints to the user.
        local: its number on its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, tree: Any) -> list[Any]:
        """The trees of all workers, in the order of their numbers."""
        return [tree]

    def broadcast(self, tree: Any) -> Any:
        """The tree of worker 0; those of the others are ignored."""
        return tree

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Copy the tensor of worker ``source`` into those of all others, of the same shape and dtype."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to one worker, which calls :meth:`receive`."""
        raise AssertionError("there is no other worker")

    def receive(self, tensor: Tensor, source: int) -> None:
        """Receive a tensor from worker ``source`` into ``tensor``, of the same shape and dtype."""
        raise AssertionError("there is no other worker")

    def from_first(self, read: Callable[[], T]) -> T:
        """The result of ``read``, which only worker 0 calls."""
        found: T = self.broadcast(read() if self.first else None)
        return found

    def map_parts(self, count: int, work: Callable[[int], T]) -> list[T]:
        """``work(i)`` for i = 0 … ``count`` − 1, each by one worker; all workers get the results in this order."""
        own = [work(number) for number in part(count, self.count, self.rank)]
        return [result for of_one in self.gather(own) for result in of_one]


ALONE = Workers()


def launched() -> Workers | None:
    """This worker by the environment variables of torchrun and similar launchers; None for a single process."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    if count < 2 or "MASTER_ADDR" not in os.environ:
        return None
    return Workers(rank, count, int(os.environ.get("LOCAL_RANK", rank)))


def part(count: int, parts: int, number: int) -> range:
    """Part ``number`` of ``count`` items in ``parts`` contiguous parts, whose sizes differ by at most 1."""
    size, more = divmod(count, parts)
    begin = number * size + min(number, more)
    return range(begin, begin + size + (number < more))


@dataclass(frozen=True)
class Share:
    """The calibration batches that one worker runs in stage 2.

    All batches are divided into at most :data:`GROUPS` contiguous groups. Each group's sum begins at zero, and the sums
    of the groups are added from the first to the last. So the total is the same to the bit for any number of workers.

    Attributes:
        batches: their numbers.
        groups: the group of each of them.
    """

    batches: range
    groups: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether its sums can be added at once, because no other worker's sums are added before them."""
        return not self.groups or self.groups[0] == 0


def share_of(batches: int, workers: Workers) -> Share:
    """The batches of this worker: whole contiguous groups; none if there are more workers than groups."""
    number = min(GROUPS, batches)
    groups = [part(batches, number, group) for group in range(number)]
    own = part(number, workers.count, workers.rank)
    if not own:
        return Share(range(0), ())
    held = range(groups[own[0]].start, groups[own[-1]].stop)
    return Share(held, tuple(group for group in own for _ in groups[group]))
