"""Text made safe for Markdown: names, values and file contents stand in a page as they are, and mark nothing up."""

from __future__ import annotations

import re
from typing import Any

# What may begin a mark within a line. Lists and headings begin a line, which no value of ours does.
_MARKS = re.compile(r"([\\`*_{}\[\]#|~$@])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]")


class Raw(str):
    """Markdown that was made here, and passes as it is."""

    __slots__ = ()


def escaped(value: Any) -> Raw:
    """``value`` as one line of plain text: no marks, no HTML, no cell borders, no links."""
    if isinstance(value, Raw):
        return value
    text = _MARKS.sub(r"\\\1", re.sub(r"[ \t\n]+", " ", _CONTROLS.sub(" ", str(value))).strip(" "))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Raw(text.replace("://", ":&#47;/").replace("www.", "www&#46;"))  # bare addresses would become links


def fenced(text: str, language: str = "") -> Raw:
    """``text`` as a block of code, whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = _CONTROLS.sub("�", text.replace("\r\n", "\n")).rstrip("\n")
    return Raw(f"{fence}{language}\n{body}\n{fence}")
