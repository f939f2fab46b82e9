"""What the user sees while work goes on: bars with the time left (plain lines without a terminal), and warnings.

How long a stage will take yet, from how long its steps took so far.

One line of progress: what is left out where the terminal is narrow, and how times and memory are written.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, TaskID
from rich.progress import Task as RichTask
from rich.text import Text

from ecoflap.support.progress import Progress, Task

_WIDE, _MIDDLE = 100, 60  # columns from which a line has all its parts, and from which it has a bar
_DETAIL = 9  # columns below which a layer's name says nothing


def line(
    width: int, name: str, done: int, total: int, elapsed: float, left: float | None, memory: str, detail: str
) -> str:
    """At most ``width`` characters: name, bar, count, time elapsed and left, memory, and what is being worked on.

    A narrow terminal shows no bar and no elapsed time; the name and the detail are cut before any number is.
    """
    bars = 16 if width >= _WIDE else 8 if width >= _MIDDLE else 0
    full = bars if total <= 0 else min(bars * done // total, bars)
    numbers = [f"{done}/{total}".rjust(2 * len(str(total)) + 1)]
    if width >= _WIDE:
        numbers.append(clock(elapsed))
    numbers += [f"left {'-:--' if left is None else clock(left)}", memory]
    parts = [*(["━" * full + "·" * (bars - full)] if bars else []), *numbers]
    rest = " ".join(parts)
    room = width - len(rest) - 1
    name = name.ljust(12 if bars else 0) if len(name) <= room else name[: max(room - 1, 0)] + "…"
    told = f"{name} {rest}"
    room = width - len(told) - 1
    if detail and room >= _DETAIL:
        told += " " + (detail if len(detail) <= room else "…" + detail[len(detail) - room + 1 :])  # its end tells most
    return told[:width]


def clock(seconds: float) -> str:
    """Such as 0:05, 12:34, 1:02:03, 3d 04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory() -> str:
    """What the process holds now, and at its peak on the GPU where one is in use: ``1.2 GB``, ``1.2+23.1 GB GPU``."""
    import psutil

    held = f"{psutil.Process().memory_info().rss / 1e9:.1f}"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return f"{held} GB"
    return f"{held}+{torch.cuda.max_memory_allocated() / 1e9:.1f} GB GPU"


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


LINE_EVERY = 15.0  # seconds between two plain lines


class _BarTask:
    def __init__(self, bars: RichProgress, task: TaskID, pace: Pace) -> None:
        self._bars, self._task, self._pace = bars, task, pace

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._pace.advance(steps)
        self._bars.update(self._task, advance=steps, detail=detail)


class _Column(ProgressColumn):
    """The whole of a line; it is made anew ten times a second, so that the time left counts down."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: RichTask) -> Text:
        pace: Pace = task.fields["pace"]
        told = line(
            self._console.width, task.description, pace.done, pace.total, pace.elapsed, pace.left(), memory(),
            task.fields["detail"],
        )  # fmt: skip
        return Text(told, no_wrap=True, overflow="crop")


class Bars:
    """One line a stage, with a bar: name, count, time elapsed and left, memory, and what is being worked on.

    A stage inside another one has its line below the other's, and takes it away when it ends.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._open: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None) -> Iterator[Task]:
        pace = Pace(total, done, weights, self._clock)
        if self._open is not None:
            inner = self._open.add_task(name, total=total, completed=done, detail="", pace=pace)
            yield _BarTask(self._open, inner, pace)
            self._open.remove_task(inner)
            return
        with RichProgress(_Column(self._console), console=self._console) as bars:
            task = bars.add_task(name, total=total, completed=done, detail="", pace=pace)
            self._open = bars
            try:
                yield _BarTask(bars, task, pace)
            finally:
                self._open = None
            bars.update(task, detail="")


class _LineTask:
    def __init__(self, write: Callable[[str], None], name: str, pace: Pace, clock: Callable[[], float]) -> None:
        self._write, self._name, self._pace, self._clock = write, name, pace, clock
        self._last, self._detail = clock(), ""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._pace.advance(steps)
        self._detail = detail
        if self._clock() - self._last >= LINE_EVERY:
            self._last = self._clock()
            self._write(self.line())

    def line(self) -> str:
        pace = self._pace
        left = pace.left()
        at_work = pace.done < pace.total
        more = [f"{left:.0f} s left"] if left is not None and at_work else []
        more += [memory(), *([self._detail] if self._detail and at_work else [])]
        return f"{self._name}: {pace.done}/{pace.total}, {pace.elapsed:.0f} s, {', '.join(more)}"


class Lines:
    """A plain line every quarter of a minute and at the end of each stage that is in no other."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None) -> Iterator[Task]:
        task = _LineTask(self._print, name, Pace(total, done, weights, self._clock), self._clock)
        self._depth += 1
        try:
            yield task
        finally:
            self._depth -= 1
        if not self._depth:
            self._print(task.line())

    def _print(self, told: str) -> None:
        self._console.print(told, markup=False, highlight=False)


def progress_on(console: Console) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)


def standard_output() -> Console:
    """Where results go. Without a terminal a table is as wide as it needs to be."""
    return _console(sys.stdout.isatty(), stderr=False)


def standard_error() -> Console:
    """Where progress goes."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(terminal: bool, stderr: bool) -> Console:
    return Console(stderr=stderr, soft_wrap=not terminal) if terminal else Console(stderr=stderr, width=160)


class Messages(logging.Handler):
    """The package's warnings, one line each on standard error, while the context is open.

    Warnings of other packages are left to the log: they speak to programmers.

    Attributes:
        quiet: say nothing.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.quiet = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.quiet:
            sys.stderr.write(f"ecoflap: warning: {' '.join(record.getMessage().split())}\n")

    def __enter__(self) -> None:
        self.quiet, self._shown = False, warnings.showwarning
        self._log = logging.getLogger("ecoflap")
        self._log.addHandler(self)
        warnings.showwarning = self._warning  # type: ignore[assignment]

    def __exit__(self, *exception: object) -> None:
        warnings.showwarning = self._shown
        self._log.removeHandler(self)

    def _warning(self, message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        level = logging.WARNING if "ecoflap" in filename else logging.INFO
        self._log.log(level, "%s", message)


messages = Messages()
