"""Versions of the packages that decide a run's numbers, read without importing them."""

from __future__ import annotations

import importlib.metadata
from functools import cache


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    from ecoflap import __version__

    return {"ecoflap": __version__, **{name: _installed(name) for name in ("torch", "transformers")}}


@cache
def _installed(package: str) -> str:
    """The version in the package's metadata, without an import: torch takes seconds."""
    return importlib.metadata.version(package)
