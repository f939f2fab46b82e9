"""Shortens paths of this machine to names, since pages and cards may be published."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_TEMPLATE = re.compile(r"\{(question)?\}")  # a prompt, even if it begins with "/"
_PROMPTS = ("prompt", "test_prompt")
# A path in a sentence, with at least one folder, so that "and/or" and "1/2" are no paths.
_IN_TEXT = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/'\"`:;,()<>|]+/)+([^\s/'\"`:;,()<>|]+)/?")
_LINE = " \\\n  "


def cached_id(path: str) -> str | None:
    """The id of the Hub's repository, for a path in its cached snapshot; None for other paths."""
    snapshot = _SNAPSHOT.search(f"{path}/")
    return "/".join(snapshot.groups()) if snapshot else None


def place_name(text: str) -> str:
    """The last part of a path that is absolute or leads up (in the Hub's cache: the id); other text unchanged."""
    if hub_id := cached_id(text):
        return hub_id
    if PurePosixPath(text).is_absolute() or text.startswith(("~", "../")):
        return PurePosixPath(text).name or text
    return PureWindowsPath(text).name if PureWindowsPath(text).is_absolute() else text


def without_places(value: Any, field: str = "") -> Any:
    """A recipe, or the value of its ``field``, with :func:`place_name` for every path."""
    if isinstance(value, Mapping):
        return {name: without_places(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, field) for item in value]
    if isinstance(value, str) and field not in _PROMPTS and not _TEMPLATE.search(value):
        return place_name(value)
    return value


def command_without_places(command: str) -> str:
    """The same for a command of :func:`~ecoflap.report.records.reproduce`; other text unchanged."""
    try:
        lines = [[_word(word) for word in shlex.split(line)] for line in command.split(_LINE)]
    except ValueError:  # an unclosed quote
        return text_without_places(command)
    return _LINE.join(shlex.join(words) for words in lines)


def _word(word: str) -> str:
    key, equals, value = word.partition("=")
    return key + equals + without_places(value) if equals and key.isidentifier() else str(without_places(word))


def text_without_places(text: str) -> str:
    """A sentence, such as a message, with each path shortened to its last part."""
    return _IN_TEXT.sub(r"\1", text)
