"""Reads what ``ecoflap evaluate --against`` compares a model with: a run's answers, or a file of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ecoflap.errors import InvalidOption
from ecoflap.evaluation.paired import Samples, paired
from ecoflap.model.files import check_place
from ecoflap.run.known_scores import Score, Scores
from ecoflap.run.names import METRICS, PREDICTIONS, RECIPE
from ecoflap.support.reading import checked, read_json

# Settings of a test that change scores by rounding only, or that explain another setting.
_FREE = ("batch_size", "length_reason")


class _Result(BaseModel):
    metric: str
    settings: dict[str, Any] = {}
    samples: Scores | None = None


class _File(BaseModel):
    format: int = Field(ge=1, le=1)
    results: dict[str, _Result]


class _Row(BaseModel):
    index: int
    dense_score: Score
    pruned_score: Score
    kind: str | None = None


class _Task(BaseModel):
    rows: list[_Row] = []


class _Predictions(BaseModel):
    tasks: dict[str, _Task] = {}


class _Metrics(BaseModel):
    dense: dict[str, _Result] = {}


@dataclass(frozen=True)
class Reference:
    """Another model's results on one test: its samples, and the settings of the test."""

    samples: Samples
    settings: Mapping[str, Any] = field(default_factory=dict)


References = dict[str, dict[str, Reference]]  # test → name of the other model → its results


def is_model(source: str) -> bool:
    """Whether ``--against`` names a model, which is then evaluated; otherwise it is a file or a run.

    Raises:
        CheckpointError: it is none of them.
    """
    path = Path(source).expanduser()
    if path.suffix == ".json" or (path / RECIPE).is_file():
        return False
    check_place(source)
    return True


def read_references(source: str, tests: list[str]) -> References:
    """The results in a file of ``ecoflap evaluate --output``, or of a run's dense and pruned model.

    Raises:
        InvalidOption: it can't be read, or has no scores of samples for one of ``tests``.
    """
    path = Path(source).expanduser()
    found = _of_run(path) if path.is_dir() else _of_file(path)
    for test in tests:
        if test not in found:
            raise InvalidOption(
                f"{source} has no scores of single samples of '{test}': give a model, a file that 'ecoflap evaluate "
                "--output' wrote for this test, or a run that recorded its answers"
            )
    return found


def _of_file(path: Path) -> References:
    content: _File = checked(read_json(path, "the results"), _File, str(path))
    return {
        name: {path.name: Reference(result.samples.samples(), result.settings)}
        for name, result in content.results.items()
        if result.samples is not None
    }


def _of_run(folder: Path) -> References:
    if not (folder / PREDICTIONS).is_file():
        return {}
    predictions: _Predictions = checked(
        read_json(folder / PREDICTIONS, "the run's answers"), _Predictions, str(folder / PREDICTIONS)
    )
    metrics: _Metrics = checked(read_json(folder / METRICS, "the run's metrics"), _Metrics, str(folder / METRICS))
    found: References = {}
    for name, task in predictions.tasks.items():
        settings = metrics.dense[name].settings if name in metrics.dense else {}
        index, kinds = [row.index for row in task.rows], [row.kind for row in task.rows]
        kinds = kinds if any(kind is not None for kind in kinds) else []
        for when in ("dense", "pruned"):
            scores = [row.dense_score if when == "dense" else row.pruned_score for row in task.rows]
            if scores:
                samples = Samples(scores, index, list(kinds))
                found.setdefault(name, {})[f"{when} model of {folder.name}"] = Reference(samples, settings)
    return found


def differences(test: str, own: Reference, others: Mapping[str, Reference]) -> dict[str, dict[str, Any]]:
    """The paired differences from other models by their names, as in ``metrics.json``.

    Raises:
        InvalidOption: the other model was evaluated on other samples or with other settings.
    """
    found = {}
    for name, other in others.items():
        for setting in dict.fromkeys([*own.settings, *other.settings]):
            now, then = own.settings.get(setting), other.settings.get(setting)
            if setting in ("data", "source") and now is not None and then is not None:
                now, then = Path(str(now)).name, Path(str(then)).name
            if setting not in _FREE and now != then:
                raise InvalidOption(f"'{test}' can't be compared with {name}: {setting} is {now} here, {then} there")
        pair = paired([own.samples], [other.samples])
        if pair is None:
            raise InvalidOption(
                f"'{test}' can't be compared with {name}: the samples differ ({len(own.samples.index)} here, "
                f"{len(other.samples.index)} there): give the same data, --limit and --seed"
            )
        found[name] = pair.to_json()
    return found
