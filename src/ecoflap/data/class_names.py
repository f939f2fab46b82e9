"""Reads class names and prompt templates: given directly, or from a text file with one per line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecoflap.errors import InvalidOption
from ecoflap.support.reading import MOST_LINES, NO_READING, read_text, reason_of


def class_names(entries: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the classes, in the order of their numbers; None for the data set's own.

    Args:
        entries: at least two names, or one path of a text file with a name a line (blank lines don't count).
            A name may appear twice, as in the list published for ImageNet: the number identifies a class.

    Raises:
        InvalidOption: the file can't be read or holds less than two names.
    """
    if not entries:
        return None
    names = _lines(entries[0], "classes") if len(entries) == 1 else tuple(entries)
    source = f"classes {entries[0]}" if len(entries) == 1 else "classes"
    if len(names) < 2:
        raise InvalidOption(f"{source}: at least two class names are needed, one per line")
    return names


def class_templates(entries: Sequence[str] | None) -> tuple[str, ...] | None:
    """Prompt templates, each with ``{}`` where the class name goes; None for the default of the task.

    Args:
        entries: templates, or one path of a text file with a template per line.

    Raises:
        InvalidOption: the file can't be read or is empty, or a template has not exactly one ``{}``.
    """
    if not entries:
        return None
    from_file = len(entries) == 1 and "{}" not in entries[0]
    if from_file and " " in entries[0].strip() and not Path(entries[0]).expanduser().exists():
        raise InvalidOption(f"class prompt {entries[0]!r}: one {{}} is needed where the class name goes")
    templates = _lines(entries[0], "class_prompts") if from_file else tuple(entries)
    if not templates:
        raise InvalidOption(f"class_prompts {entries[0]}: the file is empty; a template per line is expected")
    for template in templates:
        if template.count("{}") != 1:
            raise InvalidOption(f"class prompt {template!r}: one {{}} is needed where the class name goes")
    return templates


def is_file_entry(entries: Sequence[str] | None, *, prompts: bool) -> bool:
    """Whether ``entries`` (of ``classes``, or with ``prompts`` of ``class_prompts``) name a file."""
    return bool(entries) and len(entries or ()) == 1 and not (prompts and "{}" in (entries or ("",))[0])


def _lines(path: str, what: str) -> tuple[str, ...]:
    try:
        text = read_text(Path(path).expanduser(), MOST_LINES).removeprefix("\ufeff")
    except NO_READING as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason_of(error, "text")
        raise InvalidOption(
            f"{what}: can't read the file '{path}' ({reason}): give a text file with one entry per line"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
