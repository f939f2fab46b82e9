"""Reads JSON and YAML files from any source, and describes faults of a file in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ecoflap.errors import EcoflapError, InvalidOption

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MOST_BYTES = 1 << 30  # of a JSON file; those of large models, with a row for each layer and sample, stay below
MOST_YAML = 1 << 24  # a recipe is written by hand; the reader is a hundred times slower
MOST_LINES = 1 << 26  # of a text that is read whole: names of classes, templates, a caption
DEEPEST = 100  # levels of lists and mappings; our own files have six
NO_READING = (OSError, ValueError, RecursionError, yaml.YAMLError)  # all errors of reading


def read_json(path: str | Path, what: str, error: type[EcoflapError] = InvalidOption, *, finite: bool = True) -> Any:
    """The content of a JSON file.

    Args:
        what: the kind of file, for messages.
        error: raised if the file can't be read.
        finite: refuse NaN and infinities, which JSON does not have (configurations of transformers may).

    Raises:
        InvalidOption, or ``error``: it is not there, no file, too large, no JSON, nested too deep, ...
    """
    try:
        return json_value(read_text(path, MOST_BYTES), finite=finite)
    except NO_READING as found:
        raise error(f"can't read {what} {path}: {reason_of(found, 'JSON')}") from found


def read_yaml(path: str | Path, what: str, error: type[EcoflapError] = InvalidOption) -> Any:
    """The content of a YAML file; duplicate keys are refused. Raises as :func:`read_json`."""
    try:
        return yaml_value(read_text(path, MOST_YAML))
    except NO_READING as found:
        raise error(f"can't read {what} {path}: {reason_of(found, 'YAML')}") from found


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """A file as text; raises OSError, or ValueError if it is no UTF-8 or has more than ``most`` bytes."""
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: str | Path, most: int) -> bytes:
    """A file's bytes; raises OSError, or ValueError if there are more than ``most``."""
    with open(path, "rb", opener=_at_once) as file:
        data = file.read(most + 1)  # a device has no size, and may be endless
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def _at_once(path: str, flags: int) -> int:
    """Open a file without blocking: a pipe without a writer is then empty, instead of blocking forever."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(handle, True)  # so that a pipe with a writer is read to its end
    return handle


def json_value(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of JSON text. Raises ValueError, or RecursionError if it is nested too deep."""
    found = json.loads(text, parse_constant=_no_number if finite else None)
    _check_depth(found)
    return found


def yaml_value(text: str) -> Any:
    """The value of YAML text, in plain types. Raises yaml.YAMLError, ValueError or RecursionError."""
    _check_nesting(text)
    found = yaml.load(text, Loader=_UniqueKeys)
    _check_depth(found)
    return found


def checked(content: Any, kind: Any, where: str, error: type[EcoflapError] = InvalidOption) -> Any:
    """``content`` as ``kind``: a pydantic model, a dataclass, or a type such as ``dict[str, int]``.

    Args:
        where: the file, for the message, which also names the field.

    Raises:
        InvalidOption, or ``error``: a field is missing or has the wrong type.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as found:
        raise error(f"{where}: {first_fault(found)}") from found


def first_fault(error: Any) -> str:
    """The first field that a pydantic ``ValidationError`` names, and its fault."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def reason_of(error: BaseException, kind: str) -> str:
    """Describes the fault of a file, without Python's terms."""
    if isinstance(error, RecursionError):
        return f"it is nested more than {DEEPEST} deep"
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start}): convert it first"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no whole {kind} file ({error})"
    return " ".join(str(error).split())


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_depth(value: Any) -> None:
    """Raises RecursionError for deep nesting, before later code would reach Python's own limit."""
    level, depth = [value], 0
    seen: set[int] = set()  # with YAML's anchors, a list may be in many places, or in itself
    while level:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list) and id(item) not in seen:
                seen.add(id(item))
                inner += item.values() if isinstance(item, dict) else item
        level = [item for item in inner if isinstance(item, dict | list)]


def _check_nesting(text: str) -> None:
    """Raise for deeply nested text: the YAML reader would take seconds and gigabytes until Python's limit."""
    if any(mark * (DEEPEST + 1) in "".join(text.split()) for mark in "[{"):
        raise RecursionError


class _UniqueKeys(yaml.SafeLoader):
    """Loads only plain types, and refuses duplicate keys, of which YAML would silently take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in known:
                where = key_node.start_mark.line + 1
                raise ValueError(f"'{key}' appears twice (line {where}): leave one of them")
            known.add(key)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found
