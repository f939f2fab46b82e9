"""Describes how a recipe differs from the one that a run began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One short text for each field with another value."""
    for name, value in now.items():
        earlier = before.get(name)
        if isinstance(value, dict) and isinstance(earlier, dict):
            keys = dict.fromkeys([*earlier, *value])
            yield from differences(
                {f"{name} {key}": earlier.get(key) for key in keys}, {f"{name} {key}": value.get(key) for key in keys}
            )
        elif earlier != value:
            yield f"{name}: {_shown(earlier)} then, {_shown(value)} now"


def _shown(value: Any) -> str:
    return "nothing" if value in (None, [], {}) else str(value)
