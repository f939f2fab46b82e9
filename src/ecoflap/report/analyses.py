"""Reads and checks ``analysis/*.json``, which ``ecoflap analyse`` writes into a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ecoflap.report.reading import Content, Finite, Fraction, read_model

if TYPE_CHECKING:
    pass  # from Python 3.11 on; read by type checkers alone

FOLDER = "analysis"


class Histogram(Content):
    """Shares of the values between neighbouring edges (log10 of the absolute value); ``zeros`` are in no bin."""

    log10_edges: list[Finite]
    share: list[Annotated[float, Field(ge=0)]]
    median: Finite | None = None
    zeros: Fraction | None = None

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        if len(self.log10_edges) != len(self.share) + 1:
            raise ValueError(f"{len(self.share)} shares need {len(self.share) + 1} edges, not {len(self.log10_edges)}")
        return self


class TowerDistributions(Content):
    """The three distributions of one tower; ``local`` is Wanda's score |w|·‖x‖."""

    modality: str = "other"
    weight: Histogram | None = None
    gradient: Histogram | None = None
    local: Histogram | None = None


class Distributions(Content):
    """``distributions.json``."""

    towers: dict[str, TowerDistributions]


class Agreement(Content):
    """``agreement.json``: Spearman's rank correlation of each pair of measures over ``n`` groups."""

    granularity: str = "block"
    measures: list[str]
    spearman: list[list[Finite | None]]
    n: int | None = None

    @model_validator(mode="after")
    def _square(self) -> Agreement:
        count = len(self.measures)
        if len(self.spearman) != count or any(len(row) != count for row in self.spearman):
            raise ValueError(f"spearman should have {count} rows of {count} numbers, one for each of measures")
        return self


class Effect(Content):
    """Agreement with the exact gradient norm at one value of an option: rank correlation and mean relative error."""

    value: Finite
    spearman: Finite | None = None
    stderr: Finite | None = None
    error: Finite | None = None
    error_stderr: Finite | None = None


class Effects(Content):
    """``effects.json``: effects by option; sparsities by option, value and tower."""

    effects: dict[str, list[Effect]] = {}
    allocations: dict[str, dict[str, dict[str, Fraction | None]]] = {}


class Line(Content):
    """The loss along one random direction."""

    alpha: list[Finite]
    dense: list[Finite | None]
    pruned: list[Finite | None]

    @model_validator(mode="after")
    def _fits(self) -> Line:
        if not len(self.alpha) == len(self.dense) == len(self.pruned):
            raise ValueError("alpha, dense and pruned differ in length")
        return self


class Plane(Content):
    """The loss over two random directions: ``dense[i][j]`` at ``alpha[i]``, ``beta[j]``."""

    alpha: list[Finite]
    beta: list[Finite]
    dense: list[list[Finite | None]]
    pruned: list[list[Finite | None]]

    @model_validator(mode="after")
    def _fits(self) -> Plane:
        for name in ("dense", "pruned"):
            rows = getattr(self, name)
            if len(rows) != len(self.alpha) or any(len(row) != len(self.beta) for row in rows):
                raise ValueError(f"{name} should have a row for each of alpha with a number for each of beta")
        return self


class Landscape(Content):
    """``landscape.json``."""

    line: Line | None = None
    plane: Plane | None = None


@dataclass(frozen=True)
class Analyses:
    """The analyses of a run; None for missing ones."""

    distributions: Distributions | None = None
    agreement: Agreement | None = None
    effects: Effects | None = None
    landscape: Landscape | None = None


def read_analyses(run: Path) -> Analyses:
    """Read the existing ones of the four files.

    Raises:
        InvalidOption: one of them is broken; the message names the file and the field.
    """
    folder = run / FOLDER
    return Analyses(
        distributions=read_model(folder / "distributions.json", Distributions),
        agreement=read_model(folder / "agreement.json", Agreement),
        effects=read_model(folder / "effects.json", Effects),
        landscape=read_model(folder / "landscape.json", Landscape),
    )
