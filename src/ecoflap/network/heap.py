"""Gives freed memory back to the system where the C library would keep it."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Return the pages of all freed pieces of the C library's heap, wherever they lie in it; only glibc knows how.

    Small things that stay (the nodes of a graph) lie between large ones that are freed, and the heap grows around them
    although most of it is empty. Pages that are used again cost a page fault each: not for inner loops.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
