"""Handles Ctrl-C and SIGTERM: the first one stops the work after the current step, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from ecoflap.support.progress import LOADING, Progress, Task, plan

TOLD = "\necoflap: stopping after this step; once more stops at once\n"
AT_ONCE = "ecoflap: stopped at once; --resume goes on with what a run has written\n"
PATIENCE = 1.0  # seconds after the second signal in which Python may still handle it


class Stops:
    """A signal handler, and progress that stops when all finished work has been written.

    A step of a stage is counted after its result is stored, so the signal takes effect there; outside of stages (for
    example while a model is loaded) nothing is lost by stopping at once.

    Attributes:
        quiet: say nothing when a signal comes.
        raised: the last exception of the handler, or None.
    """

    def __init__(self) -> None:
        self.quiet = False
        self.raised: KeyboardInterrupt | None = None
        self._asked: str | None = None
        self._open = 0
        self._telling = threading.Lock()  # taken by the thread that reports the stop, and never released
        self._ends = threading.Event()  # the exception that ends the work is on its way, or the work is over

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context that handles both signals; a signal that was ignored from the start (nohup, &) stays ignored."""
        self.quiet, self.raised, self._asked, self._open = False, None, None, 0
        self._telling, self._ends = threading.Lock(), threading.Event()
        heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {number: signal.getsignal(number) for number in heard}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        watcher = threading.Thread(target=self._watch, args=(reader, heard, self._ends), name="signals", daemon=True)
        others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            for number in heard:
                signal.signal(number, self.handle)
            watcher.start()
            yield
        finally:
            self._ends.set()
            signal.set_wakeup_fd(others)
            os.close(writer)  # the watcher reads the end, and closes the other side
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self, reader: int, heard: Sequence[int], ends: threading.Event) -> None:
        """Report the first signal, and end the process soon after the second one; runs in its own thread."""
        came: list[int] = []
        while numbers := os.read(reader, 64):
            came += [number for number in numbers if number in heard]
            if came and self._open:
                self._tell()
            if len(came) > 1 and not ends.wait(PATIENCE):
                if not self.quiet:
                    os.write(2, AT_ONCE.encode())
                os._exit(143 if came[0] == signal.SIGTERM else 130)
        os.close(reader)

    def _tell(self) -> None:
        if not self.quiet and self._telling.acquire(blocking=False):
            os.write(2, TOLD.encode())  # not sys.stderr, which a write may be using

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Raise KeyboardInterrupt with the name of the first signal ("" for Ctrl-C), now or at :meth:`check`."""
        again = self._asked is not None
        self._asked = self._asked or ("SIGTERM" if number == signal.SIGTERM else "")
        if again or not self._open:
            self._ends.set()
            self.raised = KeyboardInterrupt(self._asked)
            raise self.raised
        self._tell()

    def check(self) -> None:
        """Raise KeyboardInterrupt after a signal."""
        if self._asked is not None:
            raise KeyboardInterrupt(self._asked)

    def progress(self, inner: Progress) -> Progress:
        """``inner`` with stages that end early after a signal."""
        return _Progress(inner, self)

    @contextmanager
    def stage(self, stage: AbstractContextManager[Task], left: int) -> Iterator[Task]:
        """Context with a stage of ``left`` steps; after a signal no step begins."""
        self.check()
        with stage as task:
            self._open += 1
            try:
                yield _Task(task, self, left)
            finally:
                self._open -= 1


class _Task:
    def __init__(self, inner: Task, stops: Stops, left: int) -> None:
        self._inner, self._stops, self._left = inner, stops, left

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._inner.advance(steps, detail)
        self._left -= steps
        if self._left > 0:  # otherwise the stage is about to end and write its result
            self._stops.check()

    def early(self, steps: int, detail: str = "") -> None:
        self._inner.advance(steps, detail)
        self._left -= steps

    def kept(self) -> None:
        if self._left > 0:
            self._stops.check()

    def plan(self, kinds: Sequence[str]) -> None:
        plan(self._inner, kinds)


class _Progress:
    def __init__(self, inner: Progress, stops: Stops) -> None:
        self._inner, self._stops = inner, stops

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        if name == LOADING:
            return self._inner.stage(name, total, done)
        return self._stops.stage(self._inner.stage(name, total, done), total - done)


stops = Stops()
