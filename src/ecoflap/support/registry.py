"""Names to implementations, imported only when asked for, with "did you mean" for the unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from ecoflap.errors import InvalidOption, UnknownName


def number(text: str) -> Any:
    """A number or truth value where the text is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


T = TypeVar("T")


def unknown(kind: str, name: str, known: list[str]) -> UnknownName:
    """The error for a name that is not among ``known``, with the nearest one as a suggestion."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UnknownName(f"unknown {kind} '{name}': {hint}choose from {', '.join(known)}")


def check_option_names(kind: str, name: str, known: Sequence[str], given: Iterable[str]) -> None:
    """Raises InvalidOption for the first option in ``given`` that the ``kind`` called ``name`` does not have."""
    for option in given:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise InvalidOption(f"{kind} '{name}' has no option '{option}': {has}")


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a name"),
}


def check_options(kind: str, name: str, factory: Any, given: Mapping[str, Any]) -> None:
    """Check options for the dataclass ``factory``, which the ``kind`` called ``name`` is made by.

    Raises:
        InvalidOption: there is no such option, or its value is of the wrong kind.
    """
    check_option_names(kind, name, [field.name for field in fields(factory)], given)
    check_option_kinds(kind, factory, given)


def check_option_kinds(kind: str, factory: Any, given: Mapping[str, Any]) -> None:
    """Raises InvalidOption for a value of another type than the field of ``factory`` that it is for."""
    types = {field.name: str(field.type) for field in fields(factory)}
    for option, value in given.items():
        wanted, described = _KINDS.get(types[option], ((object,), ""))
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[option] in ("int", "float")):
            raise InvalidOption(f"{kind} option {option}={value}: it must be {described}")


class Registry(Generic[T]):
    """An ordered table ``name -> "module:attribute"``, resolved at :meth:`get`.

    Args:
        kind: what the names stand for, for messages ("criterion").
        entries: name to ``"package.module:attribute"``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, str] = dict(entries)

    def get(self, name: str) -> T:
        """The object registered as ``name``.

        Raises:
            UnknownName: with the nearest registered name.
        """
        self.check(name)
        module, _, attribute = self._entries[name].partition(":")
        return cast(T, getattr(import_module(module), attribute))

    def check(self, name: str) -> str:
        """``name`` itself when it is registered, without importing anything; raises UnknownName otherwise."""
        if name not in self._entries:
            raise unknown(self.kind, name, self.names())
        return name

    def add(self, name: str, target: str) -> None:
        """Register ``target`` ("module:attribute") under ``name``; a name can't be taken twice."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is already registered as {self._entries[name]}")
        self._entries[name] = target

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
