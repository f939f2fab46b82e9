"""Turns the key-value cache off everywhere: a replayed call with a filled cache silently skips k and v."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def _configurations(config: Any, seen: set[int]) -> Iterator[Any]:
    """``config`` and the configurations nested in its attributes, each once."""
    if id(config) in seen or not hasattr(config, "__dict__"):
        return
    seen.add(id(config))
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configurations(value, seen)


@contextmanager
def cache_disabled(model: nn.Module) -> Iterator[None]:
    """``use_cache=False`` in every configuration that any submodule holds; the old values return at exit."""
    seen: set[int] = set()
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        for attribute in ("config", "generation_config"):
            for config in _configurations(getattr(module, attribute, None), seen):
                if "use_cache" in vars(config):
                    found.append((config, config.use_cache))
    try:
        for config, _ in found:
            config.use_cache = False
        yield
    finally:
        for config, value in found:
            config.use_cache = value
