"""Recognises errors that mean "out of memory", from any library, and suggests remedies."""

from __future__ import annotations

import errno
import re

from ecoflap.errors import OutOfMemory
from ecoflap.support.causes import causes

REMEDY = (
    "take a smaller --batch-size or --sequence-length, --offload-activations disk, or --device-map disk for the weights"
)
# Of torch, on the CPU and on accelerators, and of the C++ and C libraries below it and below safetensors.
_WORDS = re.compile(r"out of memory|not enough memory|bad_alloc|can(?:not|'t) allocate", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?([KMG]iB|bytes)", re.IGNORECASE)
_LIBRARIES = ("SafetensorError", "ImportError")


def memory_error(error: BaseException) -> OutOfMemory | None:
    """An error with a remedy if ``error``, or a cause of it, means that memory is short; else None."""
    for link in causes(error):
        if isinstance(link, OutOfMemory):
            return link
        if _says_so(link):
            return OutOfMemory(f"out of memory{_size(str(link))}: {REMEDY}")
    return None


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    libraries = isinstance(error, RuntimeError | OSError) or type(error).__name__ in _LIBRARIES
    return libraries and _WORDS.search(str(error)) is not None


def _size(message: str) -> str:
    found = _ASKED.search(message)
    if found is None:
        return ""
    if found[2].lower() != "bytes":
        return f" (for {found[1]} {found[2]} more)"
    return f" (for {float(found[1]) / 2**30:.1f} GiB more)" if float(found[1]) >= 2**27 else ""
