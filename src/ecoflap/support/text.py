"""Cleans foreign text (names of weights, captions, class names) for the terminal and the log."""

from __future__ import annotations

import re

# Control characters (a terminal executes them), lone surrogates (they can't be encoded), and marks that change the
# writing direction (they can disguise a line). Tabs and line ends stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The same text with each unsafe character written as its escape, such as ``\\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
