"""What the user sees while work goes on: bars with the time left (plain lines without a terminal), and warnings."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ecoflap.progress import Progress, Task

LINE_EVERY = 15.0  # seconds between two plain lines
BAR, TIME = 16, 8  # characters of a bar, and of a time such as 12:34:56
PERIOD = 600.0  # seconds of which the speed is taken: a stage's step may itself take minutes
COLUMNS = 7  # of a line, each with a space after it


class _BarTask:
    def __init__(self, bars: RichProgress, task: TaskID, room: int) -> None:
        self._bars, self._task, self._room = bars, task, room

    def advance(self, steps: int = 1, detail: str = "") -> None:
        # Cut here: left to itself, a long name would squeeze the counts and times beside it. Its end tells most.
        if len(detail) > self._room:
            detail = "…" + detail[len(detail) - self._room + 1 :] if self._room > 8 else ""
        self._bars.update(self._task, advance=steps, detail=detail)


class Bars:
    """One bar a stage: name, bar, count, time elapsed and left, and what is being worked on.

    A stage inside another one has its bar below the other's, and takes it away when it ends.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None) -> Iterator[Task]:
        if self._open is not None:
            inner = self._open.add_task(name, total=total, completed=done, detail="")
            yield _BarTask(self._open, inner, self._room(name, total))
            self._open.remove_task(inner)
            return
        columns = (
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=BAR),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=False),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        with RichProgress(*columns, console=self._console, speed_estimate_period=PERIOD) as bars:
            task = bars.add_task(name, total=total, completed=done, detail="")
            self._open = bars
            try:
                yield _BarTask(bars, task, self._room(name, total))
            finally:
                self._open = None
            bars.update(task, detail="")

    def _room(self, name: str, total: int) -> int:
        """Columns that a bar leaves for its detail."""
        return self._console.width - (
            max(len(name), 12) + BAR + 2 * len(str(total)) + 1 + 2 * TIME + len("left") + COLUMNS
        )


class _LineTask:
    def __init__(self, write: Callable[[str], None], name: str, total: int, done: int) -> None:
        self._write, self._name, self._total = write, name, total
        self._begin, self._last = time.monotonic(), time.monotonic()
        self._done = self._before = done

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= LINE_EVERY:
            self._last = now
            self._write(self.line(now))

    def line(self, now: float) -> str:
        rate = (self._done - self._before) / max(now - self._begin, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 and self._done < self._total else ""
        return f"{self._name}: {self._done}/{self._total}, {now - self._begin:.0f} s{left}"


class Lines:
    """A plain line every quarter of a minute and at the end of each stage that is in no other."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None) -> Iterator[Task]:
        task = _LineTask(lambda line: self._console.print(line, markup=False, highlight=False), name, total, done)
        self._depth += 1
        try:
            yield task
        finally:
            self._depth -= 1
        if not self._depth:
            self._console.print(task.line(time.monotonic()), markup=False, highlight=False)


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
