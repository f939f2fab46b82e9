"""Progress on a terminal as bars with the time left, and as plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ecoflap.progress import Progress, Task

LINE_EVERY = 15.0  # seconds between two plain lines


class _BarTask:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._bars.update(self._task, advance=steps, detail=detail)


class Bars:
    """One bar a stage: name, bar, count, time elapsed and left, and what is being worked on."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=False),
            TextColumn("[dim]{task.fields[detail]}", markup=True, justify="left"),
        )
        with RichProgress(*columns, console=self._console, expand=False) as bars:
            task = bars.add_task(name, total=total, completed=done, detail="")
            yield _BarTask(bars, task)
            bars.update(task, detail="")


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
    """A plain line every quarter of a minute and at the end of each stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        task = _LineTask(lambda line: self._console.print(line, markup=False, highlight=False), name, total, done)
        yield task
        self._console.print(task.line(time.monotonic()), markup=False, highlight=False)


def progress_on(console: Console) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)
