"""Writes a run's log file, also when a run ends early."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecoflap.errors import EcoflapError, OutOfMemory, StorageError
from ecoflap.run.directory import RunFailed, Stopped
from ecoflap.support.full_disk import storage_error
from ecoflap.support.memory import memory_error
from ecoflap.support.text import printable

_log = logging.getLogger("ecoflap")


@contextmanager
def explained(run: Path, log: Path) -> Iterator[None]:
    """Context that logs an error that ends the run, and adds to its message how to resume."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _log.info("stopped")
        raise Stopped(run, str(stop)) from stop
    except Exception as error:
        full = error if isinstance(error, StorageError) else storage_error(error)
        if full is not None:
            _log.info("stopped: %s", full)
            raise StorageError(f"{full}; then the same command with --resume goes on from here") from error
        short = memory_error(error)
        if short is not None:
            _log.info("stopped: out of memory", exc_info=error)
            resume = "with more free memory, the same command with --resume goes on from here"
            raise OutOfMemory(f"{short}; {resume}") from error
        if isinstance(error, EcoflapError):
            _log.info("stopped: %s", error)
            raise
        _log.info("failed", exc_info=error)
        line = (str(error).strip().splitlines() or [""])[0]
        raise RunFailed(
            f"{type(error).__name__}: {line} (the traceback is in {log}; once it is fixed, the "
            "same command with --resume goes on from here)"
        ) from error


class _LogFile(logging.FileHandler):
    """A log file that never stops the run: it ignores errors; the next result that is written reports a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Clean(logging.Formatter):
    """Removes control characters, since a log may be shown on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Context in which the package's messages are also written to the run's log file."""
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error
    formatter = _Clean("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.setLevel(level)
        _log.removeHandler(handler)
        with suppress(OSError):
            handler.close()
