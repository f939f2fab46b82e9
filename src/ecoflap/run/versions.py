"""Versions of the packages that decide a run's numbers, read without importing them."""

from __future__ import annotations

import importlib.metadata


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    from ecoflap import __version__

    # From the packages' metadata: importing torch takes seconds, and a wrong option must be reported at once.
    return {"ecoflap": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}
