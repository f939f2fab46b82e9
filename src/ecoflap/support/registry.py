"""Maps names to implementations, imported at their first use, with "did you mean" for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar, cast

from ecoflap.errors import BrokenPlugin, InvalidOption, UnknownName
from ecoflap.support.plugins import NAME, plugins


def number(text: str) -> Any:
    """The text as a number or a bool if it is one, else the text."""
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
    """Check options for the dataclass ``factory`` of the ``kind`` called ``name``.

    Raises:
        InvalidOption: there is no such option, or its value has the wrong type.
    """
    check_option_names(kind, name, [field.name for field in fields(factory)], given)
    check_option_kinds(kind, factory, given)


def check_option_kinds(kind: str, factory: Any, given: Mapping[str, Any]) -> None:
    """Raises InvalidOption for a value of another type than that field of ``factory``."""
    types = {field.name: str(field.type) for field in fields(factory)}
    for option, value in given.items():
        wanted, described = _KINDS.get(types[option], ((object,), ""))
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[option] in ("int", "float")):
            raise InvalidOption(f"{kind} option {option}={value}: it must be {described}")


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        target: ``"package.module:attribute"``, or the object itself.
        facts: class attributes of the target that are needed before its import; missing ones have their defaults. None:
            unknown, so that the target is imported to read them.
        origin: the target's package, for messages; "" for this one.
    """

    target: Any
    facts: Mapping[str, Any] | None = None
    origin: str = ""


def entry(target: str, **facts: Any) -> Entry:
    """An entry of this package, with the class attributes that differ from their defaults."""
    return Entry(target, facts)


class Registry(Generic[T]):
    """An ordered table ``name -> "module:attribute"``, resolved at :meth:`get`.

    Its own entries come first, then those that were registered at run time, then entry points of installed packages.

    Args:
        kind: of the entries, for messages ("criterion").
        entries: by name, ``"package.module:attribute"`` or an :func:`entry`.
        group: Python entry points that add to the table; None for a closed table.
        complaint: returns why an object of another package can't be an entry ("is no dataclass"), or None if it can.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, str | Entry],
        group: str | None = None,
        complaint: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.kind, self.group, self._complaint = kind, group, complaint
        self._entries: dict[str, Entry] = {
            name: line if isinstance(line, Entry) else entry(line) for name, line in entries.items()
        }

    def get(self, name: str) -> T:
        """The object registered as ``name``.

        Raises:
            UnknownName: with the nearest registered name.
            BrokenPlugin: it comes from another package, and can't be imported or used.
        """
        self.check(name)
        line = self._all()[name]
        if not line.origin:
            module, _, attribute = line.target.partition(":")
            return cast(T, getattr(import_module(module), attribute))
        return cast(T, self._from_outside(name, line))

    def fact(self, name: str, attribute: str, default: Any) -> Any:
        """The class attribute ``attribute`` of the entry ``name``; imports nothing if the table has it.

        Raises:
            BrokenPlugin: as :meth:`get`.
        """
        line = self._all().get(name)
        if line is None:
            return default
        if line.facts is not None:
            return line.facts.get(attribute, default)
        return getattr(self.get(name), attribute, default)

    def check(self, name: str) -> str:
        """Return ``name`` if it is registered, without importing anything; raises UnknownName otherwise."""
        if name not in self._all():
            raise unknown(self.kind, name, self.names())
        return name

    def add(self, name: str, target: Any) -> None:
        """Register ``target``, an object or its ``"module:attribute"``, under ``name`` for this process.

        Raises:
            InvalidOption: the name is taken or not allowed, or ``target`` has another form.
            BrokenPlugin: ``target`` can't be an entry of this table.
        """
        if not NAME.fullmatch(name):
            raise InvalidOption(f"{self.kind} name {name!r}: use letters, digits, '.', '_' and '-'")
        if name in self._all():
            raise InvalidOption(f"{self.kind} '{name}' is already registered: give it another name")
        if isinstance(target, str) and not all(target.partition(":")):
            raise InvalidOption(f"{self.kind} '{name}': {target!r} is no 'package.module:attribute'")
        line = Entry(target, origin=target if isinstance(target, str) else f"{target!r}")
        if not isinstance(target, str):
            self._from_outside(name, line)
        self._entries[name] = line

    def names(self) -> list[str]:
        return list(self._all())

    def own(self) -> list[str]:
        """Names of this package's own entries."""
        return [name for name, line in self._entries.items() if not line.origin]

    def outside(self) -> list[str]:
        """Names that other packages or the user's program have added; nothing is imported."""
        return [name for name, line in self._all().items() if line.origin]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def _all(self) -> dict[str, Entry]:
        if self.group is None:
            return self._entries
        found = {
            name: Entry(plugin.point, origin=plugin.origin)
            for name, plugin in plugins(self.group).items()
            if name not in self._entries
        }
        return self._entries | found if found else self._entries

    def _from_outside(self, name: str, line: Entry) -> Any:
        who = f"{self.kind} '{name}' of {line.origin}"
        target = line.target
        if isinstance(target, str):
            target = EntryPoint(name, target, self.group or "")
        try:
            made = target.load() if isinstance(target, EntryPoint) else target
        except (Exception, SystemExit) as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise BrokenPlugin(f"{who} can't be imported ({told}): fix that package, or uninstall it") from error
        if self._complaint is not None and (wrong := self._complaint(made)) is not None:
            raise BrokenPlugin(f"{who} {wrong}: fix that package, or uninstall it")
        return made


def dataclass_complaint(made: Any, base: type | None = None) -> str | None:
    """Why ``made`` is no dataclass that extends ``base``; None if it is."""
    if not (isinstance(made, type) and is_dataclass(made)):
        return "must be a dataclass, whose fields are its options"
    if base is not None and not issubclass(made, base):
        return f"must be a subclass of {base.__module__}.{base.__name__}"
    if missing := sorted(getattr(made, "__abstractmethods__", ())):
        return f"must define {', '.join(missing)}"
    bare = [each.name for each in fields(made) if each.default is MISSING and each.default_factory is MISSING]
    return f"must give each option a default, also {', '.join(bare)}" if bare else None
