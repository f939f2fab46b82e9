"""What ``metrics.json`` says of quality: each task's result, and how two models differ on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import paired_records

Kept = dict[str, dict[str, Any]]  # of each evaluation: its "result", and the "answers" or "losses" sample by sample


def paired_results(model: Kept, others: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """Task → name of another model → how the model differs from it on the samples that both answered."""
    found: dict[str, dict[str, Any]] = {}
    for name, kept in model.items():
        for other, results in others.items():
            if name in results:
                values = kept["result"]["value"], results[name]["result"]["value"]
                pair = paired_records(kept, results[name], *values)
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
