"""Shows progress and warnings: bars with the time left, or plain lines if the output is no terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, TaskID
from rich.progress import Task as RichTask
from rich.segment import Segment
from rich.text import Text

from ecoflap.cli.pace import Pace
from ecoflap.support.formats import clock
from ecoflap.support.progress import LOADING, Progress, Task
from ecoflap.support.text import printable

_WIDE, _MIDDLE = 100, 60  # least columns for a line with all parts, and for a line with a bar
_DETAIL = 9  # least columns for a layer's name


def line(
    width: int, name: str, done: int, total: int, elapsed: float, left: float | None, memory: str, detail: str
) -> str:
    """At most ``width`` characters: name, bar, count, time elapsed and left, memory, and the current work.

    A narrow terminal shows no bar and no elapsed time; name and detail are cut before numbers are.
    """
    bars = 16 if width >= _WIDE else 8 if width >= _MIDDLE else 0
    full = bars if total <= 0 else min(bars * done // total, bars)
    numbers = [f"{done}/{total}".rjust(2 * len(str(total)) + 1)]
    if width >= _WIDE:
        numbers.append(clock(elapsed))
    numbers += [f"left {'…' if left is None else clock(left)}", memory]
    parts = [*(["━" * full + "·" * (bars - full)] if bars else []), *numbers]
    rest = " ".join(parts)
    room = width - len(rest) - 1
    name = name.ljust(min(12, room) if bars else 0) if len(name) <= room else name[: max(room - 1, 0)] + "…"
    message = f"{name} {rest}"
    room = width - len(message) - 1
    if detail and room >= _DETAIL:
        message += " " + (detail if len(detail) <= room else "…" + detail[len(detail) - room + 1 :])
    return message[:width]


def memory() -> str:
    """The process's current memory, and the GPU's peak if one is used: ``1.2 GB``, ``1.2+23.1 GB GPU``."""
    import psutil

    held = f"{psutil.Process().memory_info().rss / 1e9:.1f}"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return f"{held} GB"
    return f"{held}+{torch.cuda.max_memory_allocated() / 1e9:.1f} GB GPU"


LINE_EVERY = 15.0  # seconds between two plain lines


class _BarTask:
    def __init__(self, bars: RichProgress, task: TaskID, pace: Pace) -> None:
        self._bars, self._task, self._pace = bars, task, pace

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._pace.advance(steps, detail)
        self._bars.update(self._task, advance=steps, detail=detail)

    def plan(self, kinds: Sequence[str]) -> None:
        self._pace.plan(kinds)


class _Column(ProgressColumn):
    """A whole line, which is redrawn ten times a second, so that the time left counts down."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: RichTask) -> Text:
        pace: Pace = task.fields["pace"]
        message = line(
            self._console.width, task.description, pace.done, pace.total, pace.elapsed, pace.left(), memory(),
            task.fields["detail"],
        )  # fmt: skip
        return Text(message, no_wrap=True, overflow="crop")


class Bars:
    """One line per stage, with a bar. The line of an inner stage is below that of the outer one, and disappears at its
    end."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._open: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        pace = Pace(total, done, self._clock)
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
        self._pace.advance(steps, detail)
        self._detail = detail
        # The last line is written at the end of the stage; for loading, by the ticker.
        if self._name == LOADING:
            return
        if self._clock() - self._last >= LINE_EVERY and self._pace.done < self._pace.total:
            self._last = self._clock()
            self._write(self.line())

    def plan(self, kinds: Sequence[str]) -> None:
        self._pace.plan(kinds)

    def line(self) -> str:
        pace = self._pace
        left = pace.left()
        at_work = pace.done < pace.total
        more = [f"{clock(left)} left"] if left is not None and at_work else []
        more += [memory(), *([self._detail] if self._detail and at_work else [])]
        return f"{self._name}: {pace.done}/{pace.total}, {clock(pace.elapsed)}, {', '.join(more)}"


class Lines:
    """A plain line every 15 seconds, and at the end of each outer stage.

    Loading has few steps: a line is written every 15 seconds without waiting for a step.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        task = _LineTask(self._print, name, Pace(total, done, self._clock), self._clock)
        if name == LOADING:
            with self._ticking(task):
                yield task
            return
        self._depth += 1
        try:
            yield task
        finally:
            self._depth -= 1
        if not self._depth:
            self._print(task.line())

    @contextmanager
    def _ticking(self, task: _LineTask) -> Iterator[None]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(LINE_EVERY):
                self._print(task.line())

        ticker = threading.Thread(target=tell, name="progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()

    def _print(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)


def progress_on(console: Console) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)


def standard_output() -> Console:
    """The console for results. Without a terminal a table is as wide as necessary."""
    return _console(sys.stdout.isatty(), stderr=False)


def standard_error() -> Console:
    """The console for progress."""
    return _console(sys.stderr.isatty(), stderr=True)


class _CleanConsole(Console):
    """A console that removes control characters from texts, but not rich's own (colours, cursor moves)."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


def _console(terminal: bool, stderr: bool) -> Console:
    return _CleanConsole(stderr=stderr, soft_wrap=not terminal) if terminal else _CleanConsole(stderr=stderr, width=160)


def print_lines(text: str, *, error: bool = False) -> None:
    """Print lines: results on standard output, errors on standard error. All printing uses this function."""
    if not error:
        sys.stdout.write(f"{printable(text)}\n")
        return
    with suppress(OSError):  # a full or closed standard error: the exit code still tells
        sys.stderr.write(f"{printable(text)}\n")


class Messages(logging.Handler):
    """Context that prints the package's warnings and notices, one line each, on standard error.

    Warnings of other packages are only logged, since they are for programmers.

    Attributes:
        quiet: print nothing.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.quiet = False

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        if not self.quiet and (kind or getattr(record, "notice", False)):
            print_lines(f"ecoflap: {kind}{' '.join(record.getMessage().split())}", error=True)

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
