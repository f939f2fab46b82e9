"""Estimates the time left of a stage from the times of its steps so far."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence

SOONEST = 1.0  # seconds of a stage before its first estimate: they contain one-time work, such as choosing kernels


class Pace:
    """Counts the steps of a stage, and estimates the time left from the times of this process's steps.

    If names of steps repeat (stage 1 probes each matrix with each batch), a step is expected to take as long as in
    earlier rounds. Before names repeat, and without names, all steps to come are expected to take the mean of the last
    three quarters of the steps so far: the first ones of a stage are slow (kernels are chosen, memory is allocated).

    If the kinds of the steps are known (:meth:`plan`), each kind is measured separately.

    Args:
        total: number of steps; an interrupted run has done ``done`` of them, in unknown times.
        clock: returns seconds.
    """

    def __init__(self, total: int, done: int, clock: Callable[[], float]) -> None:
        self.total, self.done, self._clock = total, done, clock
        self._moments = [clock()]  # the beginning, and the end of each step of this process
        self._first = ""
        self._kinds: Sequence[str] = ()  # of each step of this process, if known
        self._taken: dict[str, list[float]] = {}  # seconds of the steps of each kind
        self._others, self._round = (
            False,
            0,
        )  # whether there are several names; number of steps until the first name is repeated

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began in this process."""
        return self._clock() - self._moments[0]

    def plan(self, kinds: Sequence[str]) -> None:
        """Set the kinds of all steps to come, before the first one; steps of a kind take about the same time."""
        self._kinds = kinds

    def advance(self, steps: int, name: str = "") -> None:
        """Count ``steps`` more steps, all with this name."""
        if steps <= 0:
            return
        count = len(self._moments) - 1
        if not count:
            self._first = name
        elif name != self._first:
            self._others = True
        elif self._others and not self._round:
            self._round = count
        last, now = self._moments[-1], self._clock()
        for kind in self._kinds[count : count + steps]:
            self._taken.setdefault(kind, []).append((now - last) / steps)
        self._moments += [last + (now - last) * number / steps for number in range(1, steps + 1)]
        self.done += steps

    def left(self) -> float | None:
        """Seconds left; None if unknown: before the first step's end, and in a stage's first second."""
        moments, count, todo = self._moments, len(self._moments) - 1, self.total - self.done
        if not count or (todo > 0 and self.elapsed < SOONEST):
            return None
        if todo <= 0:
            return 0.0
        if self._kinds:
            whole_mean = (moments[-1] - moments[0]) / count  # for kinds without a measurement
            means = {kind: _later_mean(seconds) for kind, seconds in self._taken.items()}
            found = sum(n * means.get(kind, whole_mean) for kind, n in Counter(self._kinds[count:]).items())
        elif self._round:
            rounds = max(
                count // (2 * self._round), 1
            )  # only the later half of the rounds, since the machine's load may change
            starts = range(count - rounds * self._round, count, self._round)
            whole, part = divmod(todo, self._round)
            found = whole * (moments[-1] - moments[starts[0]])
            found += sum(moments[start + part] - moments[start] for start in starts)
            found /= rounds
        else:
            # Steps may be reported in bursts (a backward pass, then all its layers), so use a quarter of the time.
            start = bisect_right(moments, moments[0] + 0.75 * (moments[-1] - moments[0])) - 1
            start = max(min(start, count // 4), 0)
            found = (moments[-1] - moments[start]) / (count - start) * todo
        return max(found - (self._clock() - moments[-1]), 0.0)


def _later_mean(seconds: Sequence[float]) -> float:
    """The mean without the first quarter of the steps, which are slow."""
    later = seconds[len(seconds) // 4 :]
    return sum(later) / len(later)
