"""Reads and validates the files of a run directory; everything that the page and the tables show comes from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ecoflap.errors import InvalidOption

RECIPE, IMPORTANCE, ALLOCATION, METRICS = "recipe.yaml", "importance.json", "allocation.json", "metrics.json"
FORMAT = 1

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class LayerScore(_File):
    """One layer's importance: the score, its standard error and the number of estimates behind it."""

    name: str
    tower: str
    block: str
    modality: str = "other"
    score: Finite
    stderr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    n: Count | None = None


class Importance(_File):
    """``importance.json``."""

    method: str
    settings: dict[str, Any] = {}
    layers: list[LayerScore]


class LayerAllocation(_File):
    """One layer's share: its weights, the zeros asked for, and the sparsity measured after pruning."""

    name: str
    tower: str
    block: str
    modality: str = "other"
    shape: list[int] | None = None
    weights: Annotated[int, Field(gt=0)]
    zeros: Count
    sparsity: Fraction
    achieved: Fraction | None = None


class Allocation(_File):
    """``allocation.json``."""

    sparsity: Fraction
    max_sparsity: Fraction | None = None
    granularity: str = ""
    aggregate: str = ""
    pattern: str = ""
    layers: list[LayerAllocation]


class OtherMetric(_File):
    """A further metric of a task."""

    value: Finite | None = None
    stderr: Finite | None = None


class Quality(_File):
    """The result of one task: its value, standard error, sample count, further metrics, and each group of samples."""

    metric: str
    value: Finite | None = None
    stderr: Finite | None = None
    n: Count | None = None
    by_group: dict[str, Finite | None] | None = None
    others: dict[str, OtherMetric] = {}


class TowerSparsity(_File):
    """Zeros among the prunable weights of one tower."""

    modality: str = "other"
    weights: Count
    zeros: Count
    sparsity: Fraction


class Sparsity(_File):
    """Measured sparsity: of the prunable weights, of all parameters, and of each tower."""

    prunable: Fraction | None = None
    model: Fraction | None = None
    prunable_parameters: Count | None = None
    model_parameters: Count | None = None
    towers: dict[str, TowerSparsity] = {}


class Stage(_File):
    """Wall time and peak memory of one stage."""

    name: str
    seconds: Annotated[float, Field(ge=0)] | None = None
    peak_memory_bytes: Count | None = None
    peak_cuda_bytes: Count | None = None


class DenseWeight(_File):
    """Weights that were not pruned, and why."""

    name: str
    reason: str
    weights: Count


class Metrics(_File):
    """``metrics.json``."""

    dense: dict[str, Quality] = {}
    pruned: dict[str, Quality] = {}
    sparsity: Sparsity = Sparsity()
    dense_weights: list[DenseWeight] = []
    unreached: list[str] = []
    stages: list[Stage] = []
    environment: dict[str, Any] = {}

    def dense_by_reason(self) -> dict[str, tuple[int, int, float | None]]:
        """Reason for staying dense → (tensors, weights in them, their share of the model), the largest first."""
        totals: dict[str, tuple[int, int]] = {}
        for entry in self.dense_weights:
            count, weights = totals.get(entry.reason, (0, 0))
            totals[entry.reason] = (count + 1, weights + entry.weights)
        whole = self.sparsity.model_parameters
        ordered = sorted(totals.items(), key=lambda item: -item[1][1])
        return {reason: (count, size, size / whole if whole else None) for reason, (count, size) in ordered}


@dataclass(frozen=True)
class BlockRow:
    """One block summed over its layers; sparsities are fractions, the score is the sum of the layers' scores."""

    name: str
    tower: str
    modality: str
    weights: int
    target: float
    achieved: float | None
    score: float | None
    stderr: float | None

    @property
    def shown(self) -> float:
        """The achieved sparsity where it was measured, else the target."""
        return self.target if self.achieved is None else self.achieved


@dataclass(frozen=True)
class RunData:
    """What a run directory holds; a part whose file is absent is None."""

    path: Path
    recipe: dict[str, Any] | None
    importance: Importance | None
    allocation: Allocation | None
    metrics: Metrics | None

    @property
    def model(self) -> str:
        """The model that was pruned, as the user named it."""
        return str((self.recipe or {}).get("model") or "embedded VLM")

    @property
    def scores(self) -> dict[str, LayerScore]:
        """Layer name to its score; without those that no estimate stands behind, as with uniform importance."""
        return {layer.name: layer for layer in self.importance.layers if layer.n != 0} if self.importance else {}

    @property
    def modalities(self) -> dict[str, str]:
        """Tower name to its modality, in the order of the model."""
        found: dict[str, str] = {}
        for layer in self.allocation.layers if self.allocation else self.importance.layers if self.importance else []:
            found.setdefault(layer.tower, layer.modality)
        for name, tower in (self.metrics.sparsity.towers if self.metrics else {}).items():
            found.setdefault(name, tower.modality)
        return found

    def tower_sparsity(self) -> dict[str, TowerSparsity]:
        """Sparsity per tower as measured; from the allocation's achieved values where the metrics are absent."""
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

    def blocks(self) -> list[BlockRow]:
        """The blocks in the order of the allocation, with the standard errors of their summed scores.

        Errors of layers that were probed each on their own add in quadrature; those of one probe of the whole block
        share its noise, and add as they are.
        """
        if not self.allocation:
            return []
        groups: dict[tuple[str, str], list[LayerAllocation]] = {}
        for layer in self.allocation.layers:
            groups.setdefault((layer.tower, layer.block), []).append(layer)
        scores = self.scores
        together = self.importance is not None and self.importance.settings.get("probe") == "block"
        rows = []
        for (tower, block), layers in groups.items():
            weights = sum(layer.weights for layer in layers)
            achieved = [layer.achieved * layer.weights for layer in layers if layer.achieved is not None]
            known = [scores[layer.name] for layer in layers if layer.name in scores]
            errors = [score.stderr for score in known if score.stderr is not None]
            error = sum(errors) if together else sqrt(sum(e * e for e in errors))
            rows.append(
                BlockRow(
                    name=block,
                    tower=tower,
                    modality=layers[0].modality,
                    weights=weights,
                    target=sum(layer.zeros for layer in layers) / weights,
                    achieved=min(sum(achieved) / weights, 1.0) if len(achieved) == len(layers) else None,
                    score=sum(score.score for score in known) if len(known) == len(layers) else None,
                    stderr=error if len(errors) == len(layers) else None,
                )
            )
        return rows


M = TypeVar("M", bound=_File)


def read_run(path: Path | str) -> RunData:
    """Read a run directory.

    Args:
        path: the directory; any of its files may be absent, as in a run that has not ended.

    Raises:
        InvalidOption: the directory is missing or holds none of the run's files, or a file is not what it should be;
            the message names the file and the field.
    """
    path = Path(path)
    if not path.is_dir():
        raise InvalidOption(f"{path} is no directory: give the output directory of a run")
    run = RunData(
        path=path,
        recipe=_recipe(path / RECIPE),
        importance=_json(path / IMPORTANCE, Importance),
        allocation=_json(path / ALLOCATION, Allocation),
        metrics=_json(path / METRICS, Metrics),
    )
    if run.recipe is None and run.importance is None and run.allocation is None and run.metrics is None:
        names = ", ".join((RECIPE, IMPORTANCE, ALLOCATION, METRICS))
        raise InvalidOption(f"{path} is no run directory: it holds none of {names}")
    return run


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path} cannot be read: {error}") from error


def _recipe(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidOption(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{path} should map option names to values, but holds {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _json(path: Path, kind: type[M]) -> M | None:
    text = _text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidOption(f"{path} is not valid JSON: {error}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InvalidOption(f"{path} has format {version!r}; this version of ecoflap reads format {FORMAT}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidOption(f"{path}: {where}: {first['msg']}") from error
