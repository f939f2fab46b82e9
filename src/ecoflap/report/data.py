"""Reads and validates the files of a run directory; everything that the page and the tables show comes from here.

Reads the files that pages are made of, and says in one line what is wrong with one that is broken.

``predictions.json``: what the dense and the pruned model answered to each sample, and examples for the gallery.

``analysis/*.json``: what ``ecoflap analyse`` leaves in a run directory, read and checked.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ecoflap.errors import InvalidOption

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(BaseModel):
    """A JSON object of such a file; fields that are not known are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


M = TypeVar("M", bound=Content)


def read_text(path: Path) -> str | None:
    """The file as text; None where it does not exist.

    Raises:
        InvalidOption: it is there but cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path} cannot be read: {error}") from error


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A YAML file of keys and values; None where it does not exist.

    Raises:
        InvalidOption: it is no YAML, or no mapping.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidOption(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{path} should map option names to values, but holds {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_model(path: Path, kind: type[M]) -> M | None:
    """A JSON file of format 1 as ``kind``; None where it does not exist.

    Raises:
        InvalidOption: it is no JSON, of another format, or a field is not what it should be; the message names it.
    """
    text = read_text(path)
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
    """Agreement with the exact gradient norm at one value of an option: rank correlation, and mean relative error."""

    value: Finite
    spearman: Finite | None = None
    stderr: Finite | None = None
    error: Finite | None = None
    error_stderr: Finite | None = None


class Effects(Content):
    """``effects.json``: option → its values; and option → value → tower → sparsity."""

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
    """The analyses of a run; None for those that were not made."""

    distributions: Distributions | None = None
    agreement: Agreement | None = None
    effects: Effects | None = None
    landscape: Landscape | None = None


def read_analyses(run: Path) -> Analyses:
    """Read those of the four files that are there.

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


PREDICTIONS_FILE = "predictions.json"
EXAMPLES = 8  # of each kind on the page
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 1_000_000  # bytes of a picture that is put into the page

# Kind → its title; the order of the page.
KINDS = {
    "only_dense": "only the dense model right",
    "only_pruned": "only the pruned model right",
    "both_wrong": "both wrong",
    "both_right": "both right",
}


class Row(Content):
    """One sample: the question, the truth, and what each model answered; a score of at least 0.5 is right."""

    index: int
    question: str | None = None
    truth: str
    dense: str
    pruned: str
    dense_score: Finite
    pruned_score: Finite
    kind: str | None = None
    picture: str | None = None

    @field_validator("truth", "dense", "pruned", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value

    @property
    def outcome(self) -> str:
        """Which of the four kinds it is."""
        dense, pruned = self.dense_score >= 0.5, self.pruned_score >= 0.5
        if dense == pruned:
            return "both_right" if dense else "both_wrong"
        return "only_dense" if dense else "only_pruned"


class Counts(Content):
    """How many samples each model had right."""

    both_right: Count
    only_dense: Count
    only_pruned: Count
    both_wrong: Count

    @property
    def total(self) -> int:
        """All samples."""
        return self.both_right + self.only_dense + self.only_pruned + self.both_wrong


class TaskPredictions(Content):
    """The samples of one task."""

    rows: list[Row]
    counts: Counts


class Predictions(Content):
    """``predictions.json``."""

    tasks: dict[str, TaskPredictions] = {}


@dataclass(frozen=True)
class Example:
    """A sample of the gallery; ``picture`` is a ``data:`` address, or None."""

    row: Row
    picture: str | None


@dataclass(frozen=True)
class Group:
    """One of the four kinds of a task: how many samples, their share, and some of them."""

    kind: str
    title: str
    count: int
    share: float
    examples: list[Example]


def gallery(folder: Path, task: TaskPredictions) -> list[Group]:
    """The four kinds of a task with up to eight examples each, those with a picture first.

    Args:
        folder: the run directory, in which the pictures lie. What is no PNG file in it is not shown.
        task: the task's samples.
    """
    groups = []
    for kind, title in KINDS.items():
        rows = [row for row in task.rows if row.outcome == kind]
        shown = sorted(rows, key=lambda row: row.picture is None)[:EXAMPLES]
        count = getattr(task.counts, kind)
        examples = [Example(row, _picture(folder, row.picture)) for row in shown]
        groups.append(Group(kind, title, count, count / (task.counts.total or 1), examples))
    return groups


def _picture(folder: Path, name: str | None) -> str | None:
    """A picture of the run directory as a ``data:`` address; None for anything else."""
    if name is None:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > _LARGEST:
        return None
    content = path.read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode() if content.startswith(_PNG) else None


RECIPE, IMPORTANCE, ALLOCATION, METRICS = "recipe.yaml", "importance.json", "allocation.json", "metrics.json"


class LayerScore(Content):
    """One layer's importance: the score, its standard error and the number of estimates behind it."""

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


class Search(Content):
    """How a search came to the allocation: losses of the rounds, the zeros that it was given, the blocks' costs."""

    metric: str
    losses: Annotated[list[Finite], Field(min_length=1)]
    rounds: list[str]
    given: dict[str, Count] = {}
    costs: dict[str, Finite] = {}

    @model_validator(mode="after")
    def _a_round_for_each_loss(self) -> Self:
        if len(self.rounds) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses of {len(self.rounds)} rounds")
        return self

    @property
    def title(self) -> str:
        """What was measured, in words."""
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


class OtherMetric(Content):
    """A further metric of a task."""

    value: Finite | None = None
    stderr: Finite | None = None


class Quality(Content):
    """The result of one task: its value, standard error, sample count, further metrics, and each group of samples.

    ``unit`` and ``better`` are those of :class:`ecoflap.evaluation.Task`; None: each metric's, by its name.
    """

    metric: str
    unit: str | None = None
    better: str | None = None
    hub_type: str | None = None
    value: Finite | None = None
    stderr: Finite | None = None
    n: Count | None = None
    by_group: dict[str, Finite | None] | None = None
    others: dict[str, OtherMetric] = {}


class PairedDifference(Content):
    """One model less another on the same samples, see :class:`ecoflap.evaluation.paired.Paired`."""

    difference: Finite
    stderr: Finite | None = None
    n: Count
    better: Count
    worse: Count
    p: Fraction


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
    """Weights that were not pruned, and why."""

    name: str
    reason: str
    weights: Count


class Metrics(Content):
    """``metrics.json``."""

    dense: dict[str, Quality] = {}
    pruned: dict[str, Quality] = {}
    paired: dict[str, dict[str, PairedDifference]] = {}  # task → "dense" → the pruned model less that one
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
    """One block summed over its layers; sparsities are fractions, the score is the sum of the layers' scores; ``given``
    is the sparsity that a search was given."""

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
    predictions: Predictions | None = None
    analyses: Analyses = field(default_factory=Analyses)

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

    def given_sparsity(self) -> dict[str, float]:
        """Layer name to the sparsity that a search was given; empty where there was none."""
        found = self.allocation.search.given if self.allocation and self.allocation.search else {}
        layers = self.allocation.layers if self.allocation else []
        return {layer.name: min(found[layer.name] / layer.weights, 1.0) for layer in layers if layer.name in found}

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
        given = self.given_sparsity()
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
                    given=sum(given[x.name] * x.weights for x in layers) / weights
                    if all(x.name in given for x in layers)
                    else None,
                )
            )
        return rows


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
