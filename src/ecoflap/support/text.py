"""Cleans text from files (names of weights, captions, class names) for the terminal and the log."""

from __future__ import annotations

import re
from typing import Any

# Control characters (a terminal executes them), lone surrogates (they can't be encoded), and marks that change the
# writing direction (they can disguise a line). Tabs and line ends stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_HALF = re.compile("[\ud800-\udfff]")


def whole_characters(value: Any) -> Any:
    """The same JSON value with U+FFFD for each lone surrogate, which can't be encoded."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    return value


def printable(text: str) -> str:
    """The text with each unsafe character written as its escape, such as ``\\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


# On a page no character is executed, but these are invisible, or turn round the text that follows.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The same text for a page, with each character that would be unseen there written as its escape."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, to be quoted in ours; its class if it has no message."""
    text = str(error).strip().splitlines()
    return text[0].strip() if text else type(error).__name__


def cut(text: str, most: int = 100) -> str:
    """The beginning of a text that is longer than ``most``, with its length: for values in messages."""
    return text if len(text) <= most else f"{text[: most - 40]}… ({len(text):,} characters)"
