"""Makes the parts of ``metrics.json`` about quality: each task's result, and paired differences of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import Samples, paired
from ecoflap.run.predictions import answers_of

Kept = dict[str, dict[str, Any]]  # by evaluation: its "result" and, if it has any, its "answers" and "samples"


def record(result: TaskResult) -> dict[str, Any]:
    """The record of an evaluation in a run's journal."""
    samples = Samples.of(result)
    return {
        "result": quality(result),
        "answers": answers_of(result.predictions),
        "samples": None if samples is None else samples.to_json(),
    }


def paired_results(model: Kept, others: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """Paired differences by task and by the name of the other model."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in model.items():
        for other, results in others.items():
            samples = [Samples(**one["samples"]) for one in (own, results.get(name, {})) if one.get("samples")]
            pair = paired(samples[:1], samples[1:])
            if pair is not None:
                found.setdefault(name, {})[other] = pair.to_json()
    return found


def quality(result: TaskResult) -> dict[str, Any]:
    """A task's result as in ``metrics.json``: without predictions, and with None for values that are not finite."""
    return {
        "metric": result.metric,
        "value": _finite(result.value),
        "stderr": _finite(result.stderr),
        "n": result.n,
        "others": {
            name: {"value": _finite(other.value), "stderr": _finite(other.stderr)}
            for name, other in result.others.items()
        },
        "by_group": result.by_group and {name: _finite(value) for name, value in result.by_group.items()},
        **(
            {"groups": {name: {"n": group.n, "stderr": _finite(group.stderr)} for name, group in result.groups.items()}}
            if result.groups
            else {}
        ),
        "settings": result.settings,
        "unit": result.unit,
        "better": result.better,
        "hub_type": result.hub_type,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
