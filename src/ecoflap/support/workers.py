"""Defines workers: several processes on one job, the part of each of them, and how they exchange results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 8  # statistics are sums of so many sums at most, whoever makes them: more workers have no part in stage 2
T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """One process among ``count``; as it stands here, the only one, for which nothing is to be told.

    All workers call the same methods in the same order. What is told is a tree of dicts with string keys, lists,
    strings, numbers, None and tensors (they arrive on the CPU); tuples arrive as lists. Floats keep every bit.

    Attributes:
        rank: number of this worker; number 0 alone writes files and speaks to the user.
        local: its number on its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, tree: Any) -> list[Any]:
        """What each worker says, in the order of their numbers."""
        return [tree]

    def broadcast(self, tree: Any) -> Any:
        """What worker 0 says; what the others give is not looked at."""
        return tree

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Write the tensor of worker ``source`` into those of all others, of the same shape and dtype."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a tensor to one worker, which calls :meth:`receive`."""
        raise AssertionError("there is nobody else")

    def receive(self, tensor: Tensor, source: int) -> None:
        """Write what worker ``source`` sends into ``tensor``, of the same shape and dtype."""
        raise AssertionError("there is nobody else")

    def from_first(self, read: Callable[[], T]) -> T:
        """What ``read`` gives worker 0, which alone calls it."""
        found: T = self.broadcast(read() if self.first else None)
        return found

    def map_parts(self, count: int, work: Callable[[int], T]) -> list[T]:
        """``work(i)`` for i = 0 … ``count`` − 1, each by one worker, known to all in this order."""
        own = [work(number) for number in part(count, self.count, self.rank)]
        return [result for of_one in self.gather(own) for result in of_one]


ALONE = Workers()


def launched() -> Workers | None:
    """Who this process is by the environment that torchrun and its like set; None where it was started by itself."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    if count < 2 or "MASTER_ADDR" not in os.environ:
        return None
    return Workers(rank, count, int(os.environ.get("LOCAL_RANK", rank)))


def part(count: int, parts: int, number: int) -> range:
    """The part ``number`` of ``count`` things in ``parts`` contiguous parts, whose sizes differ by 1 at most."""
    size, more = divmod(count, parts)
    begin = number * size + min(number, more)
    return range(begin, begin + size + (number < more))


@dataclass(frozen=True)
class Share:
    """The calibration batches that one worker runs in stage 2.

    All batches are cut into at most :data:`GROUPS` contiguous groups. Each group's sum begins at zero, and the sums of
    the groups are added from the first to the last: so the total is the same to the bit for any number of workers.

    Attributes:
        batches: their numbers.
        groups: the group of each of them.
    """

    batches: range
    groups: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether its sums can be added as they come, because no other worker's stand before them."""
        return not self.groups or self.groups[0] == 0


def share_of(batches: int, workers: Workers) -> Share:
    """What of so many batches is this worker's: whole groups, contiguous; nothing for a worker that is one too many."""
    number = min(GROUPS, batches)
    groups = [part(batches, number, group) for group in range(number)]
    own = part(number, workers.count, workers.rank)
    if not own:
        return Share(range(0), ())
    held = range(groups[own[0]].start, groups[own[-1]].stop)
    return Share(held, tuple(group for group in own for _ in groups[group]))
