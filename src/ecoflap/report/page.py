"""``report.html``: one self-contained page, built from nothing but the files of a run directory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ecoflap.files import write_text
from ecoflap.report import command, formats, plots
from ecoflap.report.data import BlockRow, Metrics, OtherMetric, Quality, RunData, read_run

REPORT = "report.html"


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


@dataclass(frozen=True)
class Panel:
    """One tower's plot with its caption and its description for those who do not see it."""

    tower: str
    modality: str
    svg: Markup
    description: str


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run directory, anew from its other files.

    The same files give the same bytes. Whatever is missing is said to be "not measured".

    Returns:
        The page's path.

    Raises:
        InvalidOption: the directory is no run directory or one of its files is broken.
        StorageError: the page could not be written; an older page stays as it was.
    """
    run = read_run(run_dir)
    path = run.path / REPORT
    write_text(path, render(run))
    return path


def render(run: RunData) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("ecoflap.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=formats.percent,
        duration=formats.duration,
        size=formats.size,
        integer=formats.integer,
        scientific=formats.scientific,
        breakable=_breakable,
    )
    metrics = run.metrics or Metrics()
    recipe = run.recipe or {}
    seconds = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    blocks = run.blocks()
    return environment.get_template("report.html.j2").render(
        run=run,
        metrics=metrics,
        missing=formats.MISSING,
        tasks=list(_tasks(metrics)),
        options=list(_options(recipe)),
        records=list(_records("", _environment(recipe, metrics))),
        dense=metrics.dense_by_reason(),
        command=command.reproduce(recipe) if recipe else None,
        seconds=sum(seconds) if seconds else None,
        slowest=max(seconds, default=0.0) or 1.0,
        peak=max((s.peak_memory_bytes for s in metrics.stages if s.peak_memory_bytes is not None), default=None),
        cuda=any(stage.peak_cuda_bytes for stage in metrics.stages),
        towers=list(_towers(run, blocks)),
        sparsity_panels=_sparsity_panels(run, blocks),
        importance_panels=_importance_panels(run, blocks),
        unscored=sum(block.score is not None and block.score <= 0 for block in blocks),
        scores=run.scores,
    )


def _tasks(metrics: Metrics) -> Iterator[Task]:
    nothing = Quality(metric="")
    for name in dict.fromkeys([*metrics.dense, *metrics.pruned]):
        dense, pruned = metrics.dense.get(name, nothing), metrics.pruned.get(name, nothing)
        metric = pruned.metric or dense.metric
        before, after = dense.by_group or {}, pruned.by_group or {}
        groups = [
            _quality(group, metric, (before.get(group), None), (after.get(group), None))
            for group in dict.fromkeys([*before, *after])
        ]
        nowhere = OtherMetric()
        others = [
            _quality(other, other, _pair(dense.others.get(other, nowhere)), _pair(pruned.others.get(other, nowhere)))
            for other in dict.fromkeys([*dense.others, *pruned.others])
        ]
        label = f"all, {metric}" if others else "all"
        whole = _quality(label, metric, (dense.value, dense.stderr), (pruned.value, pruned.stderr))
        counts = sorted({quality.n for quality in (dense, pruned) if quality.n is not None})
        yield Task(
            name,
            formats.task_title(name, metric),
            " / ".join(formats.integer(n) for n in sorted(counts)),
            whole,
            others,
            groups,
        )


def _pair(measured: OtherMetric) -> tuple[float | None, float | None]:
    return measured.value, measured.stderr


def _quality(
    label: str, metric: str, dense: tuple[float | None, float | None], pruned: tuple[float | None, float | None]
) -> QualityRow:
    return QualityRow(
        label=label,
        dense=formats.metric_value(metric, *dense),
        pruned=formats.metric_value(metric, *pruned),
        change=formats.metric_change(metric, dense[0], pruned[0]),
    )


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


def _by_tower(blocks: list[BlockRow]) -> dict[str, list[BlockRow]]:
    towers: dict[str, list[BlockRow]] = {}
    for block in blocks:
        towers.setdefault(block.tower, []).append(block)
    return towers


def _sparsity_panels(run: RunData, blocks: list[BlockRow]) -> list[Panel]:
    if not run.allocation:
        return []
    target, cap = run.allocation.sparsity, run.allocation.max_sparsity
    top = min(1.0, max([target, cap or 0.0, *(block.shown for block in blocks)]) * 1.1 + 0.01)
    panels = []
    for index, (tower, own) in enumerate(_by_tower(blocks).items()):
        low, high = min(own, key=lambda block: block.shown), max(own, key=lambda block: block.shown)
        panels.append(
            Panel(
                tower=tower,
                modality=own[0].modality,
                svg=Markup(plots.sparsity_panel(own, target=target, cap=cap, top=top, prefix=f"s{index}")),
                description=f"Sparsity of the {len(own)} blocks of {tower}, from {formats.percent(low.shown)} "
                f"({low.name}) to {formats.percent(high.shown)} ({high.name}).",
            )
        )
    return panels


def _importance_panels(run: RunData, blocks: list[BlockRow]) -> list[Panel]:
    limits = plots.importance_limits(blocks)
    if limits is None:
        return []
    panels = []
    for index, (tower, own) in enumerate(_by_tower(blocks).items()):
        known = [(block.score, block.name) for block in own if block.score is not None]
        if not known:
            continue
        (low, lowest), (high, highest) = min(known), max(known)
        panels.append(
            Panel(
                tower=tower,
                modality=own[0].modality,
                svg=Markup(plots.importance_panel(own, limits=limits, prefix=f"i{index}")),
                description=f"Importance of the {len(own)} blocks of {tower}, from {formats.significant(low)} "
                f"({lowest}) to {formats.significant(high)} ({highest}).",
            )
        )
    return panels


def _breakable(name: str) -> Markup:
    """A dotted or slashed name, escaped, that may break after its separators."""
    return Markup(re.sub(r"([./])", r"\1<wbr>", str(escape(name))))


def _flat(value: Any) -> str:
    """A recipe's value on one line."""
    if value is None or value in ({}, [], ""):
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value)
    return str(value)


def _options(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The recipe's options; what is not set is named by what it stands for with the embedded model."""
    embedded = {"model": "embedded VLM", "calibration": "bundled samples", "test": "bundled questions"}
    for key, value in recipe.items():
        if key not in command.RECORDS:
            stands_for = embedded.get(key) if value is None and recipe.get("model") is None else None
            yield key, stands_for or _flat(value)


def _environment(recipe: Mapping[str, Any], metrics: Metrics) -> dict[str, Any]:
    """Where the run was made: from the metrics, else the versions that the recipe notes; and the fingerprint."""
    found = dict(metrics.environment) or {"versions": recipe.get("versions") or {}}
    return found | ({"fingerprint": recipe["fingerprint"]} if recipe.get("fingerprint") else {})


def _records(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested records as (label, text) pairs: {"versions": {"torch": "2.13"}} gives ("versions torch", "2.13")."""
    for key, item in value.items():
        label = f"{prefix} {key}".strip()
        if isinstance(item, Mapping):
            yield from _records(label, item)
        else:
            yield label, _flat(item)
