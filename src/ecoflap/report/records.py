"""Recipes and environments as pairs of a label and a text, as the pages list them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ecoflap.report import command


def flat(value: Any) -> str:
    """A recipe's value on one line."""
    if value is None or value in ({}, [], ""):
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(flat(item) for item in value)
    return str(value)


def options(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The recipe's options; what is not set is named by what it stands for with the embedded model."""
    embedded = {"model": "embedded VLM", "calibration": "bundled samples", "test": "bundled questions"}
    for key, value in recipe.items():
        if key not in command.RECORDS:
            stands_for = embedded.get(key) if value is None and recipe.get("model") is None else None
            yield key, stands_for or flat(value)


def environment(recipe: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run was made: as it was recorded, else the versions that the recipe notes; and the fingerprint."""
    found = dict(measured) or {"versions": recipe.get("versions") or {}}
    return found | ({"fingerprint": recipe["fingerprint"]} if recipe.get("fingerprint") else {})


def records(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested records as (label, text) pairs: {"versions": {"torch": "2.13"}} gives ("versions torch", "2.13")."""
    for key, item in value.items():
        label = f"{prefix} {key}".strip()
        if isinstance(item, Mapping):
            yield from records(label, item)
        else:
            yield label, flat(item)
