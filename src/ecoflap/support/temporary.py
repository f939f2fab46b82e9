"""Temporary folders that a later process removes if their own was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


class TemporaryFolder:
    """A new folder in the system's folder for temporary files (``TMPDIR``), with a name that begins with ``prefix``.

    Its process holds a lock on the folder. Folders of this prefix without a lock are abandoned, and are removed when a
    new one is made.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str) -> None:
        _remove_abandoned(prefix)
        # With another name until it is locked, since it would look abandoned.
        first = Path(tempfile.mkdtemp(prefix="new-" + prefix))
        self._lock = _locked(first)
        self.path = first.rename(first.with_name(first.name.removeprefix("new-")))

    def remove(self) -> None:
        """Remove the folder and its content; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned(prefix: str) -> None:
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if not entry.name.startswith(prefix):
                continue
            with suppress(OSError):
                own = entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
                lock = _locked(Path(entry.path)) if own else None
                if lock is not None:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle with the folder's lock; None if another process has it, or the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
