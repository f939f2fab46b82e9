"""A small grid over a pico model, and what tests read of its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecoflap.run.compare.recipe import Grid
from ecoflap.run.compare.record import Comparison

METHODS = "wanda,zeroth-order+wanda,zeroth-order+sparsegpt,magnitude"


def grid_of(data: Path, **more: Any) -> Grid:
    """Four methods, two sparsities, two seeds on the model and the text of ``data``, with the fields ``more``."""
    text = str(data / "prose.txt")
    values = {
        "model": str(data / "llama"), "calibration": text, "test": text, "test_samples": 3, "samples": 6,
        "importance_samples": 4, "batch_size": 2, "sequence_length": 12, "methods": METHODS, "sparsities": "0.5,0.7",
        "seeds": "0,1", **more,
    }  # fmt: skip
    return Grid.parse(values)


def table(comparison: Comparison) -> list[dict[str, Any]]:
    """The cells without what differs from time to time."""
    timed = ("seconds", "peak_memory_bytes", "peak_cuda_bytes")
    return [{k: v for k, v in cell.model_dump().items() if k not in timed} for cell in comparison.cells]


class Lightning(Exception):
    """Strikes the work at any place."""


def failing(function: Callable[..., object], at: int) -> Callable[..., object]:
    """``function`` that raises at its call number ``at`` (from 0)."""
    calls = iter(range(10**9))

    def wrapped(*arguments: object, **named: object) -> object:
        if next(calls) == at:
            raise Lightning
        return function(*arguments, **named)

    return wrapped
