"""Reads and checks a run directory, for the page and the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from ecoflap.allocation.rules import RULES
from ecoflap.errors import InvalidOption
from ecoflap.report.analyses import Analyses, read_analyses
from ecoflap.report.mixtures import MixtureRow, mixture_rows
from ecoflap.report.places import place_name
from ecoflap.report.predictions import PREDICTIONS_FILE, Predictions
from ecoflap.report.quality import PairedDifference, Quality
from ecoflap.report.reading import Content, Count, Finite, Fraction, read_mapping, read_model

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

RECIPE, IMPORTANCE, ALLOCATION, METRICS = "recipe.yaml", "importance.json", "allocation.json", "metrics.json"


class LayerScore(Content):
    """One layer's importance: the score, its standard error and the number of estimates."""

    name: str
    tower: str
    block: str
    modality: str = "other"
    score: Finite
    stderr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    n: Count | None = None


class Importance(Content):
    """``importance.json``."""

    method: str
    settings: dict[str, Any] = {}
    layers: list[LayerScore]


class LayerAllocation(Content):
    """One layer's allocation: its weights, the target number of zeros, and the sparsity after pruning."""

    name: str
    tower: str
    block: str
    modality: str = "other"
    shape: list[int] | None = None
    weights: Annotated[int, Field(gt=0)]
    zeros: Count
    sparsity: Fraction
    achieved: Fraction | None = None


class Search(Content):
    """The record of a search: losses of the rounds, zeros at the start, costs of the blocks."""

    metric: str
    losses: Annotated[list[Finite], Field(min_length=1)]
    rounds: list[str]
    given: dict[str, Count] = {}
    costs: dict[str, Finite] = {}

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if len(self.rounds) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses of {len(self.rounds)} rounds")
        return self

    @property
    def title(self) -> str:
        """The measured quantity as text."""
        return "KL divergence from the dense model" if self.metric == "kl" else "Calibration loss"


class Allocation(Content):
    """``allocation.json``."""

    sparsity: Fraction
    max_sparsity: Fraction | None = None
    granularity: str = ""
    aggregate: str = ""
    pattern: str = ""
    layers: list[LayerAllocation]
    search: Search | None = None


class TowerSparsity(Content):
    """Zeros among the prunable weights of one tower."""

    modality: str = "other"
    weights: Count
    zeros: Count
    sparsity: Fraction


class Sparsity(Content):
    """Measured sparsity: of the prunable weights, of all parameters, and of each tower."""

    prunable: Fraction | None = None
    model: Fraction | None = None
    prunable_parameters: Count | None = None
    model_parameters: Count | None = None
    towers: dict[str, TowerSparsity] = {}


class Stage(Content):
    """Wall time and peak memory of one stage."""

    name: str
    seconds: Annotated[float, Field(ge=0)] | None = None
    peak_memory_bytes: Count | None = None
    peak_cuda_bytes: Count | None = None


class DenseWeight(Content):
    """Weights that were not pruned, and the reason."""

    name: str
    reason: str
    weights: Count


class Metrics(Content):
    """``metrics.json``."""

    dense: dict[str, Quality] = {}
    pruned: dict[str, Quality] = {}
    baseline: dict[str, Quality] = {}  # of the same criterion with one sparsity for all layers
    paired: dict[
        str, dict[str, PairedDifference]
    ] = {}  # by task and "dense" or "baseline": the pruned model minus that one
    sparsity: Sparsity = Sparsity()
    dense_weights: list[DenseWeight] = []
    unreached: list[str] = []
    experts: dict[str, dict[str, Count]] = {}  # calibration tokens by mixture and expert
    removed_experts: list[str] = []
    stages: list[Stage] = []
    calibration: dict[str, Any] | None = None
    environment: dict[str, Any] = {}

    def mixtures(self) -> list[MixtureRow]:
        """The mixtures, with their experts' shares of the router's choices."""
        return mixture_rows(self.experts)

    def dense_by_reason(self) -> dict[str, tuple[int, int, float | None]]:
        """By reason for staying dense: (tensors, weights in them, their share of the model), the largest first."""
        totals: dict[str, tuple[int, int]] = {}
        for entry in self.dense_weights:
            count, weights = totals.get(entry.reason, (0, 0))
            totals[entry.reason] = (count + 1, weights + entry.weights)
        whole = self.sparsity.model_parameters
        ordered = sorted(totals.items(), key=lambda item: -item[1][1])
        return {reason: (count, size, size / whole if whole else None) for reason, (count, size) in ordered}


@dataclass(frozen=True)
class BlockRow:
    """One block summed over its layers; sparsities are fractions, the score is the sum of the layers' scores; ``given``
    is the sparsity at the start of a search."""

    name: str
    tower: str
    modality: str
    weights: int
    target: float
    achieved: float | None
    score: float | None
    stderr: float | None
    given: float | None = None

    @property
    def shown(self) -> float:
        """The achieved sparsity if it was measured, else the target."""
        return self.target if self.achieved is None else self.achieved


@dataclass(frozen=True)
class RunData:
    """The content of a run directory; a part whose file is missing is None."""

    path: Path
    recipe: dict[str, Any] | None
    importance: Importance | None
    allocation: Allocation | None
    metrics: Metrics | None
    predictions: Predictions | None = None
    analyses: Analyses = field(default_factory=Analyses)

    @property
    def model(self) -> str:
        """The name of the pruned model."""
        return place_name(str((self.recipe or {}).get("model") or "embedded VLM"))

    @property
    def scores(self) -> dict[str, LayerScore]:
        """Scores by layer name; without layers that have no estimates, as with uniform importance."""
        return {layer.name: layer for layer in self.importance.layers if layer.n != 0} if self.importance else {}

    @property
    def modalities(self) -> dict[str, str]:
        """Modalities by tower name, in the order of the model."""
        found: dict[str, str] = {}
        for layer in self.allocation.layers if self.allocation else self.importance.layers if self.importance else []:
            found.setdefault(layer.tower, layer.modality)
        for name, tower in (self.metrics.sparsity.towers if self.metrics else {}).items():
            found.setdefault(name, tower.modality)
        return found

    def tower_sparsity(self) -> dict[str, TowerSparsity]:
        """Measured sparsity by tower; from the allocation's achieved values if there are no metrics."""
        measured = self.metrics.sparsity.towers if self.metrics else {}
        if measured or not self.allocation:
            return measured
        totals: dict[str, tuple[str, int, float]] = {}
        for layer in self.allocation.layers:
            if layer.achieved is None:
                return {}
            modality, weights, zeros = totals.get(layer.tower, (layer.modality, 0, 0.0))
            totals[layer.tower] = (modality, weights + layer.weights, zeros + layer.achieved * layer.weights)
        return {
            name: TowerSparsity(modality=modality, weights=weights, zeros=round(zeros), sparsity=round(zeros) / weights)
            for name, (modality, weights, zeros) in totals.items()
        }

    def given_sparsity(self) -> dict[str, float]:
        """Sparsity at the start of a search by layer name; empty without a search."""
        found = self.allocation.search.given if self.allocation and self.allocation.search else {}
        layers = self.allocation.layers if self.allocation else []
        return {layer.name: min(found[layer.name] / layer.weights, 1.0) for layer in layers if layer.name in found}

    def blocks(self) -> list[BlockRow]:
        """The blocks in the order of the allocation, with the standard errors of their summed scores.

        A block's score is the sum of its layers' scores, or their mean if the measure's allocation rule uses that (OWL,
        AlphaPruning, DLP). Errors of layers with separate probes add in quadrature; those of one probe of the whole
        block have the same noise, and add linearly.
        """
        if not self.allocation:
            return []
        groups: dict[tuple[str, str], list[LayerAllocation]] = {}
        for layer in self.allocation.layers:
            groups.setdefault((layer.tower, layer.block), []).append(layer)
        scores = self.scores
        given = self.given_sparsity()
        together = self.importance is not None and self.importance.settings.get("probe") == "block"
        rule = str(self.importance.settings.get("rule")) if self.importance else ""
        mean = rule in RULES and getattr(RULES.get(rule), "aggregate", "sum") == "layer-mean"
        rows = []
        for (tower, block), layers in groups.items():
            weights = sum(layer.weights for layer in layers)
            achieved = [layer.achieved * layer.weights for layer in layers if layer.achieved is not None]
            known = [scores[layer.name] for layer in layers if layer.name in scores]
            errors = [score.stderr for score in known if score.stderr is not None]
            parts = len(layers) if mean else 1
            error = (sum(errors) if together else sqrt(sum(e * e for e in errors))) / parts
            rows.append(
                BlockRow(
                    name=block,
                    tower=tower,
                    modality=layers[0].modality,
                    weights=weights,
                    target=sum(layer.zeros for layer in layers) / weights,
                    achieved=min(sum(achieved) / weights, 1.0) if len(achieved) == len(layers) else None,
                    score=sum(score.score for score in known) / parts if len(known) == len(layers) else None,
                    stderr=error if len(errors) == len(layers) else None,
                    given=sum(given[x.name] * x.weights for x in layers) / weights
                    if all(x.name in given for x in layers)
                    else None,
                )
            )
        return rows


def read_run(path: Path | str) -> RunData:
    """Read a run directory.

    Args:
        path: the directory; any of its files may be missing, as in an unfinished run.

    Raises:
        InvalidOption: the directory is missing or has none of the run's files, or a file is wrong; the message names
            the file and the field.
    """
    path = Path(path)
    if not path.is_dir():
        raise InvalidOption(f"{path} is no directory: give the output directory of a run")
    run = RunData(
        path=path,
        recipe=read_mapping(path / RECIPE),
        importance=read_model(path / IMPORTANCE, Importance),
        allocation=read_model(path / ALLOCATION, Allocation),
        metrics=read_model(path / METRICS, Metrics),
        predictions=read_model(path / PREDICTIONS_FILE, Predictions),
        analyses=read_analyses(path),
    )
    if run.recipe is None and run.importance is None and run.allocation is None and run.metrics is None:
        names = ", ".join((RECIPE, IMPORTANCE, ALLOCATION, METRICS))
        raise InvalidOption(f"{path} is no run directory: it holds none of {names}")
    return run
