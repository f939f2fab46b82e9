"""Refuses to run code that a recipe file names, unless the user allows it with each command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ecoflap.errors import InvalidOption


def refuse_code(recipe: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Check that a recipe file runs no code that the user did not ask for.

    Args:
        recipe: the fields of the file.
        given: fields that the user gave on the command line or in Python.
        source: the name of the file for messages.

    Raises:
        InvalidOption: the file asks for code, and ``given`` does not have the same value.
    """
    for what, flag, allowed in _asked(recipe, given):
        if not allowed:
            raise InvalidOption(
                f"{source} asks to run code ({what}), which a file can't allow: read that code, then give "
                f"{flag} yourself"
            )


def _asked(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Each request for code: its text, the flag that allows it, and whether that was given."""
    if recipe.get("trust_remote_code") not in (None, False):
        yield "trust_remote_code", "--trust-remote-code (or --no-trust-remote-code)", "trust_remote_code" in given
    objective = recipe.get("objective")
    if isinstance(objective, str) and ":" in objective:
        yield f"objective: {objective}", f"--objective {objective}", "objective" in given
    entries: Any = recipe.get("evaluations")
    holders = [recipe.get("task_options")]
    holders += [entry.get("options") for entry in entries if isinstance(entry, Mapping)] if _is_list(entries) else []
    for options in holders:
        # Task files of lm-eval may name Python functions, which are called when the files are read.
        if isinstance(options, Mapping) and options.get("include_path") is not None:
            folder = options["include_path"]
            own: Mapping[str, Any] = given.get("task_options") or {}
            allowed = own.get("include_path") == folder
            yield f"include_path: {folder}", f"--task-option include_path={folder}", allowed


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
