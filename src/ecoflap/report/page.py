"""Writes ``report.html``, one self-contained page, from the files of a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ecoflap.report import records
from ecoflap.report.bench import read_bench
from ecoflap.report.charts import analysis as analysis_charts
from ecoflap.report.charts import run as run_charts
from ecoflap.report.data import BlockRow, Metrics, RunData, read_run
from ecoflap.report.html import PanelGroup, Plots, environment
from ecoflap.report.places import without_places
from ecoflap.report.predictions import gallery
from ecoflap.report.quality import OtherMetric, PairedDifference, Quality
from ecoflap.run.citations import RECOVERY_PAPERS, citations
from ecoflap.run.manifest import Manifest
from ecoflap.support import formats
from ecoflap.support.files import write_text


@dataclass(frozen=True)
class QualityRow:
    """One row of the quality table, formatted."""

    label: str
    dense: str
    pruned: str
    change: str
    uniform: str = ""  # change from the model with one sparsity for all layers


@dataclass(frozen=True)
class Task:
    """One task, formatted: its value, further metrics, then each group of samples; ``n`` samples.

    ``uniform`` has the result of the same criterion with one sparsity for all layers; "" if it was not measured.
    """

    name: str
    title: str
    n: str
    whole: QualityRow
    uniform: str
    others: list[QualityRow]
    groups: list[QualityRow]

    @property
    def against_uniform(self) -> bool:
        """Whether groups or further metrics are also compared with the uniform baseline."""
        return any(row.uniform for row in (*self.others, *self.groups))


def tasks(metrics: Metrics) -> Iterator[Task]:
    """The tasks of either model, in order."""
    nothing = Quality(metric="")
    for name in dict.fromkeys([*metrics.dense, *metrics.pruned]):
        dense, pruned = metrics.dense.get(name, nothing), metrics.pruned.get(name, nothing)
        metric = pruned.metric or dense.metric
        unit = pruned.unit if pruned.metric else dense.unit
        before, after = dense.by_group or {}, pruned.by_group or {}
        pairs, baseline = metrics.paired.get(name, {}), metrics.baseline.get(name, nothing)
        models = (dense, pruned, baseline)
        groups = [
            _part(
                (pruned if group in after else dense).group_label(group), metric, unit,
                [model.of_group(group) for model in models], partial(PairedDifference.of_group, name=group), pairs,
            )
            for group in dict.fromkeys([*before, *after])
        ]  # fmt: skip
        nowhere = OtherMetric()
        others = [
            _part(
                other, other, unit, [_pair(model.others.get(other, nowhere)) for model in models],
                partial(PairedDifference.of_other, metric=other), pairs,
            )
            for other in dict.fromkeys([*dense.others, *pruned.others])
        ]  # fmt: skip
        label = f"all, {metric}" if others else "all"
        whole = _row(label, metric, unit, (dense.value, dense.stderr), (pruned.value, pruned.stderr))
        change = whole.change + formats.paired_change(metric, pairs.get("dense"), dense.value, unit=unit)
        whole = replace(whole, change=change)
        counts = sorted({quality.n for quality in (dense, pruned) if quality.n is not None})
        n = " / ".join(formats.integer(count) for count in counts)
        uniform = formats.against_uniform(metric, pairs.get("baseline"), baseline.value, pruned.value, unit=unit)
        yield Task(name, formats.task_title(name, metric), n, whole, uniform, others, groups)


def _part(
    label: str,
    metric: str,
    unit: str | None,
    values: Sequence[tuple[float | None, float | None]],
    pair_of: Callable[[PairedDifference | None], PairedDifference | None],
    pairs: Mapping[str, PairedDifference],
) -> QualityRow:
    """The row of a group or a further metric, with paired changes from dense model and uniform baseline.

    Args:
        values: of the dense model, the pruned one and the baseline, with standard errors.
        pair_of: gets the difference of this row from the task's paired difference.
    """
    dense, pruned, baseline = values
    row = _row(label, metric, unit, dense, pruned)
    of_dense, of_baseline = (pair_of(pairs.get(name)) for name in ("dense", "baseline"))
    uniform = ""
    if baseline[0] is not None and pruned[0] is not None:
        uniform = formats.metric_change(metric, baseline[0], pruned[0], unit=unit)
        uniform += formats.paired_change(metric, of_baseline, baseline[0], unit=unit)
    change = row.change + formats.paired_change(metric, of_dense, dense[0], unit=unit)
    return replace(row, change=change, uniform=uniform)


def _pair(measured: OtherMetric) -> tuple[float | None, float | None]:
    return measured.value, measured.stderr


def _row(
    label: str,
    metric: str,
    unit: str | None,
    dense: tuple[float | None, float | None],
    pruned: tuple[float | None, float | None],
) -> QualityRow:
    return QualityRow(
        label=label,
        dense=formats.metric_value(metric, *dense, unit=unit),
        pruned=formats.metric_value(metric, *pruned, unit=unit),
        change=formats.metric_change(metric, dense[0], pruned[0], unit=unit),
    )


REPORT = "report.html"


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run directory, from its other files; return its path.

    The same files give the same bytes. Missing values are shown as "not measured".

    Raises:
        InvalidOption: the directory is no run directory or one of its files is broken.
        StorageError: the page could not be written; an older page is unchanged.
    """
    run = read_run(run_dir)
    path = run.path / REPORT
    with Manifest(run.path).writing(REPORT):
        write_text(path, render(run))
    return path


def render(run: RunData) -> str:
    """The page as text."""
    metrics = run.metrics or Metrics()
    recipe = without_places(run.recipe or {})
    seconds = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    blocks = run.blocks()
    plots = Plots()
    panels = _panels(run, blocks, plots)
    method, rule = (run.importance.method, run.importance.settings.get("rule")) if run.importance else (None, None)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            metrics=metrics,
            tasks=list(tasks(metrics)),
            options=list(records.options(recipe)),
            records=list(records.records("", records.environment(recipe, metrics.environment))),
            dense=metrics.dense_by_reason(),
            command=records.reproduce(recipe) if recipe else None,
            seconds=sum(seconds) if seconds else None,
            slowest=max(seconds, default=0.0) or 1.0,
            peak=max((s.peak_memory_bytes for s in metrics.stages if s.peak_memory_bytes is not None), default=None),
            cuda=any(stage.peak_cuda_bytes for stage in metrics.stages),
            disk=records.on_disk(run),
            bench=read_bench(run.path),
            towers=list(_towers(run, blocks)),
            unscored=sum(block.score is not None and block.score <= 0 for block in blocks),
            scores=run.scores,
            given=run.given_sparsity(),
            galleries=_galleries(run),
            papers=citations("ecoflap", *(_text(name) for name in (method, rule, *_of_stage_2(recipe)))),
            **panels,
            **plots.context(),
        )
    )


def _panels(run: RunData, blocks: list[BlockRow], plots: Plots) -> dict[str, PanelGroup]:
    found = run.analyses
    layers = run_charts.layer_importance_charts(run)
    search = run.allocation.search if run.allocation else None
    return {
        "sparsity_panels": plots.group("sparsity", run_charts.sparsity_charts(run, blocks)),
        "heat_panels": plots.group("heat", run_charts.heat_charts(run) if run_charts.differs_in_blocks(run) else []),
        "search_panels": plots.group("search", run_charts.loss_charts(search)),
        "cost_panels": plots.group("block-cost", run_charts.cost_charts(search, blocks)),
        "importance_panels": plots.group("importance", run_charts.importance_charts(blocks)),
        "layer_panels": plots.group("matrix", layers),
        "distribution_panels": plots.group(
            "distribution", analysis_charts.distribution_charts(found.distributions) if found.distributions else []
        ),
        "agreement_panels": plots.group(
            "agreement", [analysis_charts.agreement_chart(found.agreement)] if found.agreement else []
        ),
        "effect_panels": plots.group("effect", analysis_charts.effect_charts(found.effects) if found.effects else []),
        "share_panels": plots.group("share", analysis_charts.share_charts(found.effects) if found.effects else []),
        "landscape_panels": plots.group(
            "landscape", analysis_charts.landscape_charts(found.landscape) if found.landscape else []
        ),
    }


def _galleries(run: RunData) -> list[dict[str, Any]]:
    if run.predictions is None:
        return []
    return [
        {"name": name, "counts": task.counts, "groups": gallery(run.path, task)}
        for name, task in run.predictions.tasks.items()
    ]


def _towers(run: RunData, blocks: list[BlockRow]) -> Iterator[dict[str, Any]]:
    """Per tower: modality, blocks, weights, target and measured sparsity."""
    measured = run.tower_sparsity()
    for name, modality in run.modalities.items():
        own = [block for block in blocks if block.tower == name]
        weights = sum(block.weights for block in own)
        yield {
            "name": name,
            "modality": modality,
            "blocks": len(own) or None,
            "weights": measured[name].weights if name in measured else weights or None,
            "target": sum(block.target * block.weights for block in own) / weights if weights else None,
            "achieved": measured[name].sparsity if name in measured else None,
        }


def _of_stage_2(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    """The parts of stage 2, by the names of their papers."""
    recovery = RECOVERY_PAPERS if recipe.get("recover") else ()
    return recovery if recipe.get("pruned") else (recipe.get("criterion"), *recovery)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
