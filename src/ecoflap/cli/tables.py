"""Prints tables on the terminal or as JSON: a model's layers, an allocation, results of tasks, the end of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ecoflap.allocation import Allocation
from ecoflap.report.data import Metrics, RunData, read_run
from ecoflap.report.quality import OtherMetric, PairedDifference, Quality
from ecoflap.support import formats

if TYPE_CHECKING:
    from ecoflap.report.finetune_page import ChannelsRecord


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # Text: brackets in a name are no markup


def allocation_table(allocation: Allocation) -> Table:
    """Sparsity of each tower, and of its least and most sparse block."""
    title = f"sparsity {allocation.sparsity:g}, cap {allocation.max_sparsity:g}, per {allocation.granularity}"
    table = new_table(title, "tower", "weights", "zeros", "sparsity", "lowest block", "highest block")
    towers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in allocation.layers:
        sums = towers[row.tower][row.block]
        sums[0] += row.weights
        sums[1] += row.zeros
    for tower, blocks in towers.items():
        weights, zeros = (sum(sums[i] for sums in blocks.values()) for i in (0, 1))
        shares = [sums[1] / sums[0] for sums in blocks.values()]
        low, high = percent(min(shares)), percent(max(shares))
        add_row(table, tower, f"{weights:,}", f"{zeros:,}", percent(zeros / weights), low, high)
    table.add_section()
    total, zeros = allocation.total_weights, allocation.zeros
    add_row(table, "all prunable weights", f"{total:,}", f"{zeros:,}", percent(zeros / total), "", "")
    if allocation.model_parameters and allocation.model_sparsity is not None:
        share = percent(allocation.model_sparsity)
        add_row(table, "the whole model", f"{allocation.model_parameters:,}", f"{zeros:,}", share, "", "")
    return table


def quality_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each task, further metric and group of samples; one column for each model compared with."""
    others = list(dict.fromkeys(name for result in results.values() for name in result.get("paired") or {}))
    table = new_table("", "task", "value", "n", *(f"change from {name}" for name in others))
    for task, result in results.items():
        unit, pairs = result.get("unit"), result.get("paired") or {}
        value = formats.metric_value(result["metric"], result["value"], result["stderr"], unit=unit)
        changes = [_change(result, pairs.get(name), result["value"]) for name in others]
        add_row(table, formats.task_title(task, result["metric"]), value, f"{result['n']:,}", *changes)
        settings = result.get("settings") or {}
        if why := settings.get("length_reason"):
            add_row(table, f"  windows of {settings['sequence_length']} tokens ({why}; --sequence-length sets it)")
        for metric, other in (result.get("others") or {}).items():
            text = formats.metric_value(metric, other["value"], other["stderr"], unit=unit)
            of_other = [(pairs.get(name) or {}).get("others", {}).get(metric) for name in others]
            measured = {"metric": metric, "unit": unit}
            add_row(table, f"  {metric}", text, "", *(_change(measured, found, other["value"]) for found in of_other))
        for group, part in (result["by_group"] or {}).items():
            size = (result.get("groups") or {}).get(group) or {}
            text = formats.metric_value(result["metric"], part, size.get("stderr"), unit=unit)
            found = [(pairs.get(name) or {}).get("groups", {}).get(group) for name in others]
            add_row(
                table, f"  {group}", text, f"{size['n']:,}" if size else "", *(_change(result, f, part) for f in found)
            )
    return table


def _change(result: Mapping[str, Any], found: Mapping[str, Any] | None, value: float | None) -> str:
    """A paired difference from another model as text."""
    if found is None or value is None:
        return ""
    pair = PairedDifference.model_validate(found)
    metric, unit, other = result["metric"], result.get("unit"), value - pair.difference
    return formats.metric_change(metric, other, value, unit=unit) + formats.paired_change(
        metric, pair, other, unit=unit
    )


NAMED = 8  # layers without tokens that the terminal lists; the rest are in metrics.json and on the page


def summary_table(run: RunData | Path | str) -> Table:
    """Dense against pruned quality, and sparsity per tower.

    Args:
        run: a run directory, or the result of :func:`ecoflap.report.data.read_run`.

    Raises:
        InvalidOption: as ``read_run``.
    """
    data = run if isinstance(run, RunData) else read_run(run)
    metrics = data.metrics or Metrics()
    table = Table(title=Text(data.model), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")

    nothing = Quality(metric="")
    for task in dict.fromkeys([*metrics.dense, *metrics.pruned]):
        dense, pruned = metrics.dense.get(task, nothing), metrics.pruned.get(task, nothing)
        metric = pruned.metric or dense.metric
        unit = pruned.unit if pruned.metric else dense.unit
        pair_of_dense = metrics.paired.get(task, {}).get("dense")
        add_row(
            table,
            formats.task_title(task, metric),
            formats.metric_value(metric, dense.value, dense.stderr, unit=unit),
            formats.metric_value(metric, pruned.value, pruned.stderr, unit=unit),
            formats.metric_change(metric, dense.value, pruned.value, unit=unit)
            + formats.paired_change(metric, pair_of_dense, dense.value, unit=unit),
        )
        uniform = metrics.baseline.get(task, nothing)
        if uniform.value is not None:
            pair = metrics.paired.get(task, {}).get("baseline")
            add_row(
                table,
                "  one sparsity for all layers",
                "",
                formats.metric_value(metric, uniform.value, uniform.stderr, unit=unit),
                "against it "
                + formats.metric_change(metric, uniform.value, pruned.value, unit=unit)
                + formats.paired_change(metric, pair, uniform.value, unit=unit),
            )
        for other in dict.fromkeys([*dense.others, *pruned.others]):
            before, after = dense.others.get(other, OtherMetric()), pruned.others.get(other, OtherMetric())
            add_row(
                table,
                f"  {other}",
                formats.metric_value(other, before.value, before.stderr, unit=unit),
                formats.metric_value(other, after.value, after.stderr, unit=unit),
                formats.metric_change(other, before.value, after.value, unit=unit)
                + formats.paired_change(
                    other, PairedDifference.of_other(pair_of_dense, other), before.value, unit=unit
                ),
            )
    if not metrics.dense and not metrics.pruned:
        add_row(table, "quality", formats.MISSING, formats.MISSING)

    table.add_section()
    add_row(table, "sparsity, prunable weights", "", formats.percent(metrics.sparsity.prunable))
    add_row(table, "sparsity, whole model", "", formats.percent(metrics.sparsity.model))
    for name, tower in data.tower_sparsity().items():
        add_row(table, f"  {tower.modality}: {name}", "", formats.percent(tower.sparsity))
    left = metrics.dense_by_reason()
    if left:
        shares = [share for _, _, share in left.values() if share is not None]
        add_row(table, "left dense inside blocks, of the model", "", formats.percent(sum(shares) if shares else None))
        for reason, (_, size, share) in left.items():
            add_row(table, f"  {reason}", "", formats.percent(share), f"{size:,} weights")
    if metrics.removed_experts:
        add_row(table, "experts whose weights are all zero", "", f"{len(metrics.removed_experts)} experts")
        _named(table, metrics.removed_experts)
    if metrics.unreached:
        add_row(table, "reached by no calibration token", "", f"{len(metrics.unreached)} layers")
        _named(table, metrics.unreached)
    return table


def _named(table: Table, names: Sequence[str]) -> None:
    """A row for each of the first names, and a row that says where the others are."""
    for name in names[:NAMED]:
        add_row(table, f"  {name}")
    if len(names) > NAMED:
        add_row(table, "  … all in metrics.json")


def finetune_table(folder: Path) -> Table:
    """Quality dense, pruned and fine-tuned, and the outcome of the training.

    Raises:
        InvalidOption: as :func:`ecoflap.report.finetune_page.read_finetune`.
    """
    from ecoflap.report.finetune_page import MODELS, read_finetune, tests  # not at the top: it imports matplotlib

    recipe, metrics = read_finetune(folder)
    table = new_table(
        str(recipe.get("model") or "embedded VLM"), "", *(name.lower() for name in MODELS.values()), "gain"
    )
    for test in tests(metrics):
        for number, line in enumerate(test.lines):
            add_row(table, f"  {line.label}" if number else test.title, *line.values, line.gain)
    if not metrics.finetuned:
        add_row(table, "quality", *(formats.MISSING for _ in MODELS))
    table.add_section()
    training, percent = metrics.training, formats.percent
    losses = dict(training.held_out)
    before, after = (losses.get(step) for step in (0, training.best))
    shown = [formats.MISSING if loss is None else formats.significant(loss, 4) for loss in (before, after)]
    add_row(table, "held-out loss", "", *shown)
    add_row(table, "sparsity, prunable weights", "", "", percent(metrics.sparsity.prunable))
    if metrics.channels is not None:
        for label, kept in kept_channels(metrics.channels):
            add_row(table, label, "", "", kept)
        for entry, (old, new) in metrics.channels.config.items():
            add_row(table, f"  {entry}", f"{old:,}", "", f"{new:,}")
        parameters = [metrics.channels.parameters.get(name) for name in ("dense", "saved")]
        add_row(table, "parameters", formats.integer(parameters[0]), "", formats.integer(parameters[1]))
    add_row(table, "steps", "", "", f"{training.steps:,} of {training.planned:,}")
    if training.best != training.steps:
        add_row(table, "  the weights are those after", "", "", f"{training.best:,}")
    return table


def kept_channels(channels: ChannelsRecord) -> Iterator[tuple[str, str]]:
    """For each tower and kind, the smallest and largest number of channels that stay in a block."""
    for tower, kind in dict.fromkeys((row.tower, row.kind) for row in channels.groups):
        kept = [row.kept for row in channels.groups if (row.tower, row.kind) == (tower, kind)]
        widths = [row.width for row in channels.groups if (row.tower, row.kind) == (tower, kind)]
        span = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"
        yield f"channels kept, {kind}, {tower}", f"{span} of {max(widths):,}"


def stages_table(run: RunData | Path | str) -> Table:
    """Time and peak memory of a run's stages.

    Raises:
        InvalidOption: as ``read_run``.
    """
    data = run if isinstance(run, RunData) else read_run(run)
    metrics = data.metrics or Metrics()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "time", "peak memory"):
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    for stage in metrics.stages:
        memory = formats.size(stage.peak_memory_bytes)
        if stage.peak_cuda_bytes:
            memory += f" + {formats.size(stage.peak_cuda_bytes)} on the GPU"
        add_row(table, stage.name, formats.duration(stage.seconds), memory)
    seconds = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    add_row(table, "all stages", formats.duration(sum(seconds) if seconds else None), "")
    return table


def bench_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """One table per model from the result of :func:`ecoflap.run.bench.bench`."""
    machine = found["machine"]
    for model in found["models"]:
        cells = list(dict.fromkeys((row["threads"], row["batch"]) for row in model["speed"]))
        title = f"{model['model']} (kernels: {machine['kernels']}, {machine['processors']} processors)"
        heads = [f"{'1 thread' if threads == 1 else f'{threads} threads'}, batch {batch}" for threads, batch in cells]
        table = new_table(title, "variant", "stored", "in memory", "load", *heads)
        speed = {(row["variant"], row["threads"], row["batch"]): row for row in model["speed"]}
        for variant in model["variants"]:
            name, stored, seconds = variant["variant"], variant["stored_bytes"], variant["load_seconds"]
            add_row(
                table,
                name,
                "" if stored is None else f"{stored / 1e6:.1f} MB",
                f"{variant['resident_bytes'] / 1e6:.1f} MB",
                "" if seconds is None else formats.duration(seconds),
                *(_pace(speed[(name, threads, batch)]) for threads, batch in cells),
            )
        table.caption = Text(
            "first token in ms, tokens per second, each with its ratio to dense bfloat16", justify="left"
        )
        table.caption_justify = "left"
        yield table


def _pace(row: Mapping[str, Any]) -> str:
    first, rate = 1e3 * row["first_token_seconds"], row["tokens_per_second"]
    return f"{first:.0f} ms ({row['first_token_ratio']:.2f}×)\n{rate:.1f} /s ({row['rate_ratio']:.2f}×)"
