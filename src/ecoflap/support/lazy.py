"""Imports public names at their first use, so that ``import ecoflap`` and ``--help`` need no torch."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would take longer than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package`` (PEP 562).

    Args:
        package: its ``__name__``, for the message.
        homes: the module of each public name.

    The returned function raises AttributeError for a name that is not in ``homes``.
    """

    def getattribute(name: str) -> Any:
        if name in homes:
            from importlib import import_module

            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return getattribute
