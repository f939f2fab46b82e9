"""Checks that a number is in a sensible range, so that a typing error is reported before hours of work."""

from __future__ import annotations

from ecoflap.errors import InvalidOption

MOST_ROUNDS = 100_000  # iterations: more would take days, and values converge long before
SMALLEST, LARGEST = 1e-12, 1e6  # for factors that in practice are near 1, or below


def check_count(name: str, value: int, least: int = 1, most: int = MOST_ROUNDS) -> None:
    """Raises InvalidOption if ``value`` is no whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidOption(f"{name} must be at least {least} and at most {most:,}, not {_shown(value)}")


def check_positive(name: str, value: float, most: float = LARGEST) -> None:
    """Raises InvalidOption if ``value`` is no number from :data:`SMALLEST` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= most:
        raise InvalidOption(
            f"{name} must be above 0 (at least {SMALLEST:g}) and at most {most:,g}, not {_shown(value)}"
        )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidOption for a number outside of ``low`` to ``high``."""
    if not low <= value <= high:
        raise InvalidOption(f"{name} must be from {low:g} to {high:g}, not {value}")


def _shown(value: object) -> str:
    """The value as text; Python refuses to print integers of many thousand digits."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a number of {value.bit_length()} bits"
    return repr(value)
