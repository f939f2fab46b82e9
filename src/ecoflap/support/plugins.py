"""Finds the entry points of other packages, without importing these."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, distributions

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names allowed on the command line, in recipes and in file names


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        point: loads it.
        origin: the distribution's name and version, for messages.
    """

    point: EntryPoint
    origin: str


def plugins(group: str) -> dict[str, Plugin]:
    """The entry points of ``group`` by name, sorted by their distributions; nothing is imported.

    Unusable entries are left out, with a warning that names the distribution: an unreadable file of entry points, a
    name that is not allowed, a name that two distributions use.
    """
    return _plugins(group, tuple(sys.path))


@lru_cache(maxsize=16)
def _plugins(group: str, path: tuple[str, ...]) -> dict[str, Plugin]:
    found: dict[str, Plugin] = {}
    for origin, point in sorted(_points(group), key=lambda each: (each[0], each[1].name)):
        if not NAME.fullmatch(point.name):
            _warn(
                f"{origin} gives {group} the name {point.name!r}, which is left out: use letters, digits, '.', '_', '-'"
            )
        elif point.name in found:
            _warn(f"{found[point.name].origin} and {origin} both give {group} '{point.name}': the first one is used")
        else:
            found[point.name] = Plugin(point, origin)
    return found


def _points(group: str) -> Iterator[tuple[str, EntryPoint]]:
    seen: set[str] = set()
    for distribution in distributions():
        if group not in (distribution.read_text("entry_points.txt") or ""):
            continue
        name = str(distribution.name)
        if name in seen:  # an older copy, later on the path
            continue
        seen.add(name)
        yield from _of(distribution, f"{name} {distribution.version}", group)


def _of(distribution: Distribution, origin: str, group: str) -> list[tuple[str, EntryPoint]]:
    try:
        return [(origin, point) for point in distribution.entry_points if point.group == group]
    except Exception as error:  # the file has a format that Python's parser does not accept
        _warn(f"the entry points of {origin} can't be read ({type(error).__name__}): its {group} are left out")
        return []


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
