"""What the user sees while work goes on: bars with the time left (plain lines without a terminal), and warnings."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, TaskID
from rich.progress import Task as RichTask
from rich.text import Text

from ecoflap.display import line, memory
from ecoflap.pace import Pace
from ecoflap.progress import Progress, Task

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
