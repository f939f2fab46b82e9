"""Ctrl-C and SIGTERM: the first one ends the work after the step that is under way, the second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from ecoflap.support.progress import Progress, Task

TOLD = "\necoflap: stopping after this step; once more stops at once\n"


class Stops:
    """A signal handler, and progress that stops where all that was done has been written.

    A step of a stage is counted once its result is kept, so the signal takes effect there; outside of any stage
    (while a model is loaded, say) nothing is lost by stopping at once.

    Attributes:
        quiet: say nothing when a signal comes.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._asked: str | None = None
        self._open = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Be the handler of both signals; one that this process was started deaf to (nohup, &) stays unheard."""
        self.quiet, self._asked, self._open = False, None, 0
        heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """Raises KeyboardInterrupt, whose argument says which signal it was ("" for Ctrl-C): now, or at :meth:`check`.

        It is always the first one's: a job that is terminated and then interrupted was terminated.
        """
        again = self._asked is not None
        self._asked = self._asked or ("SIGTERM" if number == signal.SIGTERM else "")
        if again or not self._open:
            raise KeyboardInterrupt(self._asked)
        if not self.quiet:
            os.write(2, TOLD.encode())  # not sys.stderr, which may be in the middle of a write itself

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self._asked is not None:
            raise KeyboardInterrupt(self._asked)

    def progress(self, inner: Progress) -> Progress:
        """``inner``, whose stages end early when a signal has come."""
        return _Progress(inner, self)

    @contextmanager
    def stage(self, stage: AbstractContextManager[Task], left: int) -> Iterator[Task]:
        """A stage with ``left`` steps to do; none begins when a signal has come."""
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
        if self._left > 0:  # else the stage is about to end, and its result to be written
            self._stops.check()


class _Progress:
    def __init__(self, inner: Progress, stops: Stops) -> None:
        self._inner, self._stops = inner, stops

    def stage(
        self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None
    ) -> AbstractContextManager[Task]:
        return self._stops.stage(self._inner.stage(name, total, done, weights), total - done)


stops = Stops()
