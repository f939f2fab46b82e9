"""What ``metrics.json`` says of quality: each task's result, and how two models differ on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import Samples, paired
from ecoflap.run.predictions import answers_of

Kept = dict[str, dict[str, Any]]  # of each evaluation: its "result", its "answers" and its "samples", if it has any


def record(result: TaskResult) -> dict[str, Any]:
    """What a run's journal keeps of an evaluation."""
    samples = Samples.of(result)
    return {
        "result": quality(result),
        "answers": answers_of(result.predictions),
        "samples": None if samples is None else samples.to_json(),
    }


def paired_results(model: Kept, others: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """Task → name of another model → how the model differs from it on the samples that both answered."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in model.items():
        for other, results in others.items():
            samples = [Samples(**one["samples"]) for one in (own, results.get(name, {})) if one.get("samples")]
            pair = paired(samples[:1], samples[1:])
            if pair is not None:
                found.setdefault(name, {})[other] = pair.to_json()
    return found


def quality(result: TaskResult) -> dict[str, Any]:
    """A task's result as in ``metrics.json``: without the single predictions, None for what is no finite number."""
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
