"""Checks the options of an allocation; turns numbers into exact fractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ecoflap.errors import InvalidOption
from ecoflap.support.registry import unknown

GRANULARITIES = ("block", "expert", "layer", "tower")
AGGREGATES = ("sum", "mean", "layer-mean")
BUDGETS = ("global", "tower")


def unit(option: str, value: object) -> Fraction:
    """``value`` as the exact fraction of its decimal form, within [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidOption(f"{option} must be a number from 0 to 1, not {value!r}")
    return Fraction(str(float(value)))


def choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise unknown(option, value, list(known))
    return value


def field(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}[kind]
        raise InvalidOption(f"{where}: '{key}' must be {wanted}, not {value!r}")
    return value


def check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidOption(f"layer '{name}' appears {count} times")


def fixed_ratio(pattern: str) -> tuple[Fraction, int] | None:
    """The sparsity that an N:M ``pattern`` fixes and its M; None for "unstructured"."""
    if pattern == "unstructured":
        return None
    from ecoflap.allocation.patterns import NofM, parse_pattern  # patterns.py imports torch

    parsed = parse_pattern(pattern)
    return (parsed.sparsity, parsed.group) if isinstance(parsed, NofM) else None
