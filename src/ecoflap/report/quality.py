"""The results of the tasks before and after, formatted: the headline's cards and the table of quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecoflap.report import formats
from ecoflap.report.data import Metrics, OtherMetric, Quality


@dataclass(frozen=True)
class QualityRow:
    """One line of the quality table, formatted."""

    label: str
    dense: str
    pruned: str
    change: str


@dataclass(frozen=True)
class Task:
    """One task, formatted: the whole, further metrics of the whole, then each group of samples; ``n`` samples."""

    name: str
    title: str
    n: str
    whole: QualityRow
    others: list[QualityRow]
    groups: list[QualityRow]


def tasks(metrics: Metrics) -> Iterator[Task]:
    """The tasks of either model, in order."""
    nothing = Quality(metric="")
    for name in dict.fromkeys([*metrics.dense, *metrics.pruned]):
        dense, pruned = metrics.dense.get(name, nothing), metrics.pruned.get(name, nothing)
        metric = pruned.metric or dense.metric
        before, after = dense.by_group or {}, pruned.by_group or {}
        groups = [
            _row(group, metric, (before.get(group), None), (after.get(group), None))
            for group in dict.fromkeys([*before, *after])
        ]
        nowhere = OtherMetric()
        others = [
            _row(other, other, _pair(dense.others.get(other, nowhere)), _pair(pruned.others.get(other, nowhere)))
            for other in dict.fromkeys([*dense.others, *pruned.others])
        ]
        label = f"all, {metric}" if others else "all"
        whole = _row(label, metric, (dense.value, dense.stderr), (pruned.value, pruned.stderr))
        counts = sorted({quality.n for quality in (dense, pruned) if quality.n is not None})
        n = " / ".join(formats.integer(count) for count in counts)
        yield Task(name, formats.task_title(name, metric), n, whole, others, groups)


def _pair(measured: OtherMetric) -> tuple[float | None, float | None]:
    return measured.value, measured.stderr


def _row(
    label: str, metric: str, dense: tuple[float | None, float | None], pruned: tuple[float | None, float | None]
) -> QualityRow:
    return QualityRow(
        label=label,
        dense=formats.metric_value(metric, *dense),
        pruned=formats.metric_value(metric, *pruned),
        change=formats.metric_change(metric, dense[0], pruned[0]),
    )
