"""Breaks a job at its n-th file operation, in a process of its own: as a kill does, or as a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecoflap.errors import StorageError
from ecoflap.run.journal import EstimateFile

KILLED, FULL, DONE, WRONG = 137, 28, 0, 70
_GROWING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.truncate")


def broken(job: Callable[[], object], folder: Path, at: int, kind: str) -> int:
    """Run ``job`` in a fork; how it ended: KILLED, FULL (told as StorageError), DONE, or WRONG.

    Args:
        folder: operations on files outside of it don't count, and go well.
        at: number of the operation (from 1) before which the process is killed, or from which on nothing can be
            written any more. A line of the journal of estimates is then written in part.
        kind: "kill" or "full".
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def tick(growing: bool) -> None:
        nonlocal count
        count += 1
        if kind == "kill" and count == at:
            os._exit(KILLED)
        if kind == "full" and count >= at and growing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        growing = event == "os.mkdir" or (event == "open" and bool(arguments[2] & _GROWING))
        if not growing and event not in _CHANGING:
            return
        if isinstance(arguments[0], str | bytes | os.PathLike) and _within(arguments[0], folder):
            tick(growing)

    append = EstimateFile.append

    def appended(self: EstimateFile, estimate: Any) -> None:
        nonlocal count
        if count + 1 == at:
            os.write(self._file.fileno(), b'["model.layers.0.self_attn')
        from ecoflap.support.files import storage

        with storage(folder):
            tick(growing=True)
        append(self, estimate)

    EstimateFile.append = appended  # type: ignore[method-assign]
    sys.addaudithook(hook)
    try:
        job()
    except StorageError:
        os._exit(FULL)
    except BaseException as error:
        print(repr(error), error.__cause__, error.__context__, file=sys.stderr, flush=True)
        os._exit(WRONG)
    os._exit(DONE)


def _within(path: Any, folder: Path) -> bool:
    return Path(os.fsdecode(path)).is_relative_to(folder)
