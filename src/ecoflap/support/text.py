"""Cleans foreign text (names of weights, captions, class names) for the terminal and the log."""

from __future__ import annotations

import re

# Control characters (a terminal obeys them), half characters (no encoding has them), and marks that turn the direction
# of writing, with which a line may read as another one. Tabs and ends of lines stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The same text with each unsafe character written as its escape, such as ``\\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
