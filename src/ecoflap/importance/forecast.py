"""Forecasts the time of stage 1 from its first probes, and logs it once."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable

from ecoflap.support.progress import Task, early, kept

_log = logging.getLogger("ecoflap")

WAIT = 30.0  # seconds after which there is a forecast also within the first batch
SOONEST = 5.0  # seconds that must have gone by: the first probes of a stage are slow, or together too short to tell
LONG = 1800.0  # seconds from which a faster way is named
FASTER = {
    "zeroth-order": "--importance gradient-norm measures the same without noise, by one backward pass per batch",
    "forward-mode": "--importance gradient-norm measures the same without noise, by one backward pass per batch",
    "sensitivity": "--importance gradient-norm takes one backward pass per batch, and --search goes on from there",
}
REPLAYED = ("zeroth-order", "forward-mode")  # their first probes are the longest: later ones recompute fewer blocks
LESS = "fewer --importance-samples or a shorter --sequence-length take less"


class Forecast:
    """A task that forecasts the time of the whole stage after the first probes.

    Args:
        task: also receives every step.
        name: of the importance.
        steps: number of steps to come.
        together: steps that belong together, such as all layers of a batch; before these are done there is a forecast
            only after half of them, and with ``lead``.
        lead: share of the time of such steps before the first of them; 0 if unknown.
        clock: returns seconds.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        steps: int,
        together: int = 1,
        lead: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task, self._name, self._steps, self._together = task, name, steps, together
        self._lead, self._clock, self._begin = lead, clock, clock()
        self._done, self._told = 0, False

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._task.advance(steps, detail)
        self._count(steps)

    def early(self, steps: int, detail: str = "") -> None:
        early(self._task, steps, detail)
        self._count(steps)

    def kept(self) -> None:
        kept(self._task)

    def _count(self, steps: int) -> None:
        self._done += steps
        elapsed = self._clock() - self._begin
        if self._told or elapsed < SOONEST or not 0 < self._done < self._steps:
            return
        whole, part = divmod(self._done, self._together)
        done = float(whole)  # pieces
        if part:
            if not self._lead or elapsed < WAIT or part < self._together / 2:
                return
            done += self._lead + (1 - self._lead) * part / self._together
        self._told = True
        self._tell(elapsed * self._steps / self._together / done)

    def _tell(self, seconds: float) -> None:
        word = "up to" if self._name in REPLAYED else "about"
        line = f"importance {self._name} takes {word} {hours_and_minutes(seconds)}"
        if seconds > LONG:
            warnings.warn(f"{line}; {FASTER.get(self._name, LESS)}", stacklevel=5)
        else:
            _log.info("%s", line, extra={"notice": seconds >= 60})


def hours_and_minutes(seconds: float) -> str:
    """Such as 3 h 5 min, 12 min; below a minute: 20 s."""
    if seconds < 60:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
