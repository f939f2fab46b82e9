"""Runs jobs in forks of the test's process: real processes to kill, without the seconds that their imports take."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class Fork:
    """A running process.

    Attributes:
        out, err: files that hold what it prints.
    """

    def __init__(self, job: Callable[[], object], out: IO[bytes], err: IO[bytes]) -> None:
        self.out, self.err = out, err
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(job, out.fileno(), err.fileno())

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, flags)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self.poll(flags=0)
        assert code is not None
        return code

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Return as soon as ``reached``; fail if the process ends before."""
        while not reached():
            assert self.poll() is None, self.printed()
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def printed(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        out, err = (os.pread(file.fileno(), 10**7, 0).decode() for file in (self.out, self.err))
        return out, err


@contextmanager
def forked(job: Callable[[], object]) -> Iterator[Fork]:
    """A process that does ``job`` and ends with its exit code: 0, or 1 after a traceback; killed at the end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        fork = Fork(job, out, err)
        try:
            yield fork
        finally:
            fork.send(signal.SIGKILL)
            fork.wait()


def ecoflap(folder: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> Callable[[], Any]:
    """The command line with ``arguments``, called from ``folder``, as a job."""

    def job() -> None:
        from ecoflap.cli import main

        os.chdir(folder)
        os.environ.update(environment or {})
        sys.argv = ["ecoflap", *map(str, arguments)]
        main()

    return job


def _become(job: Callable[[], object], out: int, err: int) -> None:
    """Do the job with the signals and streams of a process that a shell starts; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGALRM):  # the latter is pytest-timeout's
            signal.signal(number, signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        job()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
