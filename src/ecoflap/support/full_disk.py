"""Recognises an error of a library that means "the disk is full", or that the system refuses files."""

from __future__ import annotations

import errno
import os
import re

from ecoflap.errors import StorageError
from ecoflap.support.causes import causes

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "free some space",
    errno.EROFS: "choose another --output",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}
_LIBRARIES = ("SafetensorError", "RuntimeError", "Exception")  # the Rust libraries', and torch's
_NUMBER = re.compile(r"\(os error (\d+)\)|\((\d+)\)$")
_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos", re.DOTALL)  # has no number


def storage_error(error: BaseException) -> StorageError | None:
    """One line with a remedy if ``error``, or the error that it was raised from, says so; else None."""
    for link in causes(error):
        number = _number(link)
        if number in _REMEDIES:
            name = getattr(link, "filename", None)
            where = f"can't use {name}: " if name else "a file can't be written or opened: "
            return StorageError(f"{where}{os.strerror(number)}; {_REMEDIES[number]}")
    return None


def _number(error: BaseException) -> int:
    """The system's number of an error; 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ not in _LIBRARIES:
        return 0
    text = str(error).strip()
    if _WRITER.search(text):
        return errno.ENOSPC
    found = _NUMBER.search(text)
    if found is None:
        return 0
    number = int(found[1] or found[2])
    return number if found[1] or os.strerror(number) in text else 0
