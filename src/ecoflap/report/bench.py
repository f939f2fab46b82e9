"""Reads ``bench.json`` of a run, the measured gain of packing, as a table of the run's page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ecoflap.report.reading import Content, Count, read_model
from ecoflap.run.names import BENCH

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Variant(Content):
    """One form of the model: bytes in memory and on the disk, seconds to load."""

    variant: str
    resident_bytes: Count
    stored_bytes: Count | None = None
    load_seconds: Positive | None = None


class Speed(Content):
    """One variant with a number of threads and a batch size; ratios are to the dense model in bfloat16."""

    variant: str
    threads: Count
    batch: Count
    first_token_seconds: Positive
    tokens_per_second: Positive
    first_token_ratio: Positive
    rate_ratio: Positive


class Measured(Content):
    """One model in its variants."""

    model: str
    variants: list[Variant]
    speed: list[Speed]


class Machine(Content):
    """The machine of the measurement."""

    kernels: str = ""
    processors: Count | None = None


class Bench(Content):
    """``bench.json``."""

    machine: Machine = Machine()
    models: list[Measured]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Threads and batch sizes, in order."""
        return list(dict.fromkeys((row.threads, row.batch) for model in self.models for row in model.speed))

    def heads(self) -> list[str]:
        """The cells as text."""
        return [f"{threads} thread{'s' if threads != 1 else ''}, batch {batch}" for threads, batch in self.cells]

    def variants(self) -> Iterator[Variant]:
        """The variants of every model."""
        for model in self.models:
            yield from model.variants

    def rows(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Each variant's name with the first token and the rate of each cell, as text."""
        for model in self.models:
            found = {(row.variant, row.threads, row.batch): row for row in model.speed}
            for variant in model.variants:
                speeds = [found.get((variant.variant, *cell)) for cell in self.cells]
                yield variant.variant, [("", "") if speed is None else _words(speed) for speed in speeds]


def _words(speed: Speed) -> tuple[str, str]:
    first = f"{1e3 * speed.first_token_seconds:.0f} ms ({speed.first_token_ratio:.2f}×)"
    return first, f"{speed.tokens_per_second:.1f} /s ({speed.rate_ratio:.2f}×)"


def read_bench(run: Path) -> Bench | None:
    """The measurement in the run directory ``run``; None if there is none. Raises InvalidOption: the file is broken."""
    return read_model(run / BENCH, Bench)
