"""How long a stage will take yet, from how long its steps took so far."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

RECENT = 0.5  # of what is done, by weight: the part that tells the speed
BURST = 0.01  # of that part's time: what comes within it came together


class Pace:
    """Steps done, and the time left.

    The speed is that of the second half of what is done (by weight): the first steps of a stage are slow (kernels are
    chosen, memory is fetched), and a machine's load changes. Between two steps the time left counts down.

    Args:
        total: number of steps, ``done`` of which were done before (by an interrupted run: their times are not known).
        weights: how long each of the other steps takes, in any unit, in their order; None, or of another length than
            there are such steps: all alike.
        clock: seconds.
    """

    def __init__(self, total: int, done: int, weights: Sequence[float] | None, clock: Callable[[], float]) -> None:
        self.total, self.done, self._clock = total, done, clock
        if weights is None or len(weights) != total - done:
            weights = [1.0] * max(total - done, 0)
        self._sums = list(accumulate(weights, initial=0.0))  # of the first n steps of this process
        self._before = done
        self._begin = clock()
        self._moments, self._behind = [self._begin], [0.0]  # when so much of the weight was done

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began in this process."""
        return self._clock() - self._begin

    def advance(self, steps: int) -> None:
        """``steps`` more are done."""
        self.done += steps
        if steps:
            self._moments.append(self._clock())
            self._behind.append(self._sums[min(self.done - self._before, len(self._sums) - 1)])

    def left(self) -> float | None:
        """Seconds; None as long as nothing is known."""
        behind, moment = self._behind[-1], self._moments[-1]
        if behind <= 0:
            return None
        if self.done >= self.total:
            return 0.0
        first = bisect_left(self._behind, behind * (1 - RECENT))
        first -= self._behind[first] == behind  # one long step: the speed is its own
        # Steps may come in bursts: those that came together with this one belong to the time before it.
        start = self._moments[first]
        last = bisect_right(self._moments, start + BURST * (moment - start)) - 1
        first = last if self._behind[last] < behind else first
        per_weight = (moment - self._moments[first]) / (behind - self._behind[first])
        return max(per_weight * (self._sums[-1] - behind) - (self._clock() - moment), 0.0)
