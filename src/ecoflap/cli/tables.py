"""Prints tables on the terminal or as JSON: a model's layers, an allocation, results of tasks, the end of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ecoflap.allocation import Allocation
from ecoflap.model.parts import Anatomy, Unprunable
from ecoflap.report.data import Metrics, RunData, read_run
from ecoflap.report.mixtures import mixture_rows
from ecoflap.report.quality import OtherMetric, Quality
from ecoflap.support import formats


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # Text: brackets in a name are no markup


def anatomy_tables(anatomy: Anatomy, note: str) -> Iterator[Table]:
    """Towers with their sizes; kinds of layers in each tower; what stays dense and why."""
    total = anatomy.total_parameters
    towers = _table(note, "tower", "modality", "blocks", "layers", "prunable weights", "of the model")
    for tower in anatomy.towers:
        share = _percent(tower.numel / total)
        _row(
            towers,
            tower.name,
            tower.modality,
            str(len(tower.blocks)),
            str(len(tower.layers)),
            f"{tower.numel:,}",
            share,
        )
    towers.add_section()
    share = _percent(anatomy.prunable_parameters / total)
    blocks = str(len(anatomy.blocks))
    _row(towers, "all", "", blocks, str(len(anatomy.layers)), f"{anatomy.prunable_parameters:,}", share)
    half = _percent(0.5 * anatomy.prunable_parameters / total)
    caption = f"sparsity 50.0 % of the prunable weights is {half} of the whole model\n"
    towers.caption = Text(caption, justify="left")
    towers.caption_justify = "left"
    yield towers

    kinds = _table("layers", "in each block of the tower", "shape", "matrices", "weights")
    for tower in anatomy.towers:
        count: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
        for layer in tower.layers:
            count[(layer.kind, layer.shape)] += 1
        _row(kinds, f"{tower.name}:", "", "", "")
        for (name, shape), times in count.items():
            _row(kinds, f"  {name}", f"{shape[0]} × {shape[1]}", str(times), f"{times * shape[0] * shape[1]:,}")
    yield kinds

    for title, dense in (("dense, inside blocks", anatomy.unprunable), ("dense, outside of blocks", anatomy.outside)):
        if dense:
            yield _dense_table(title, dense, total)


def experts_tables(routing: Mapping[str, Mapping[str, int]]) -> Iterator[Table]:
    """For each mixture, the shares of the router's choices that its experts get, and which get none."""
    if not routing:
        return
    table = _table("experts", "tokens sent", "least", "median", "most", "never chosen")
    for row in mixture_rows(routing):
        shares = [_percent(share) for share in (row.least, row.median, row.most)]
        _row(table, f"{row.name}: {row.experts}", f"{row.tokens:,}", *shares, ", ".join(row.idle) or "–")
    yield table


def _dense_table(title: str, dense: Sequence[Unprunable], total: int) -> Table:
    table = _table(title, "reason", "weights", "of the model", "for example")
    reasons: dict[str, list[Unprunable]] = defaultdict(list)
    for entry in dense:
        reasons[entry.reason].append(entry)
    for reason, entries in reasons.items():
        size = sum(entry.numel for entry in entries)
        _row(table, reason, f"{size:,}", _percent(size / total), entries[0].name)
    table.add_section()
    size = sum(entry.numel for entry in dense)
    _row(table, "all", f"{size:,}", _percent(size / total), "")
    return table


def anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    """The same as plain data, every layer named."""
    return {
        "total_parameters": anatomy.total_parameters,
        "prunable_parameters": anatomy.prunable_parameters,
        "prunable_share": anatomy.prunable_parameters / anatomy.total_parameters,
        "dense_parameters": sum(entry.numel for entry in anatomy.unprunable),
        "traced": anatomy.traced,
        "towers": [
            {
                "name": tower.name,
                "modality": tower.modality,
                "blocks": [
                    {
                        "name": block.name,
                        "layers": [{"name": layer.name, "shape": list(layer.shape)} for layer in block.layers],
                    }
                    for block in tower.blocks
                ],
            }
            for tower in anatomy.towers
        ],
        "dense": [{"name": e.name, "reason": e.reason, "weights": e.numel} for e in anatomy.unprunable],
        "outside": [{"name": e.name, "reason": e.reason, "weights": e.numel} for e in anatomy.outside],
    }


def allocation_table(allocation: Allocation) -> Table:
    """Sparsity per tower, and the least and most sparse of its blocks."""
    title = f"sparsity {allocation.sparsity:g}, cap {allocation.max_sparsity:g}, per {allocation.granularity}"
    table = _table(title, "tower", "weights", "zeros", "sparsity", "lowest block", "highest block")
    towers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in allocation.layers:
        sums = towers[row.tower][row.block]
        sums[0] += row.weights
        sums[1] += row.zeros
    for tower, blocks in towers.items():
        weights, zeros = (sum(sums[i] for sums in blocks.values()) for i in (0, 1))
        shares = [sums[1] / sums[0] for sums in blocks.values()]
        low, high = _percent(min(shares)), _percent(max(shares))
        _row(table, tower, f"{weights:,}", f"{zeros:,}", _percent(zeros / weights), low, high)
    table.add_section()
    total, zeros = allocation.total_weights, allocation.zeros
    _row(table, "all prunable weights", f"{total:,}", f"{zeros:,}", _percent(zeros / total), "", "")
    if allocation.model_parameters and allocation.model_sparsity is not None:
        share = _percent(allocation.model_sparsity)
        _row(table, "the whole model", f"{allocation.model_parameters:,}", f"{zeros:,}", share, "", "")
    return table


def quality_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per task, one for each of its further metrics, and one per group of its samples."""
    table = _table("", "task", "value", "n")
    for task, result in results.items():
        unit = result.get("unit")
        value = formats.metric_value(result["metric"], result["value"], result["stderr"], unit=unit)
        _row(table, formats.task_title(task, result["metric"]), value, f"{result['n']:,}")
        settings = result.get("settings") or {}
        if why := settings.get("length_reason"):
            _row(table, f"  windows of {settings['sequence_length']} tokens ({why}; --sequence-length sets it)", "", "")
        for metric, other in (result.get("others") or {}).items():
            text = formats.metric_value(metric, other["value"], other["stderr"], unit=unit)
            _row(table, f"  {metric}", text, "")
        for group, part in (result["by_group"] or {}).items():
            size = (result.get("groups") or {}).get(group) or {}
            text = formats.metric_value(result["metric"], part, size.get("stderr"), unit=unit)
            _row(table, f"  {group}", text, f"{size['n']:,}" if size else "")
    return table


NAMED = 8  # layers without tokens that the terminal lists; the rest are in metrics.json and on the page


def summary_table(run: RunData | Path | str) -> Table:
    """Dense against pruned quality, and sparsity per tower.

    Args:
        run: a run directory, or what :func:`ecoflap.report.data.read_run` made of it.

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
        _row(
            table,
            formats.task_title(task, metric),
            formats.metric_value(metric, dense.value, dense.stderr, unit=unit),
            formats.metric_value(metric, pruned.value, pruned.stderr, unit=unit),
            formats.metric_change(metric, dense.value, pruned.value, unit=unit)
            + formats.paired_change(metric, metrics.paired.get(task, {}).get("dense"), dense.value, unit=unit),
        )
        uniform = metrics.baseline.get(task, nothing)
        if uniform.value is not None:
            pair = metrics.paired.get(task, {}).get("baseline")
            _row(
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
            _row(
                table,
                f"  {other}",
                formats.metric_value(other, before.value, before.stderr, unit=unit),
                formats.metric_value(other, after.value, after.stderr, unit=unit),
                formats.metric_change(other, before.value, after.value, unit=unit),
            )
    if not metrics.dense and not metrics.pruned:
        _row(table, "quality", formats.MISSING, formats.MISSING)

    table.add_section()
    _row(table, "sparsity, prunable weights", "", formats.percent(metrics.sparsity.prunable))
    _row(table, "sparsity, whole model", "", formats.percent(metrics.sparsity.model))
    for name, tower in data.tower_sparsity().items():
        _row(table, f"  {tower.modality}: {name}", "", formats.percent(tower.sparsity))
    left = metrics.dense_by_reason()
    if left:
        shares = [share for _, _, share in left.values() if share is not None]
        _row(table, "left dense inside blocks, of the model", "", formats.percent(sum(shares) if shares else None))
        for reason, (_, size, share) in left.items():
            _row(table, f"  {reason}", "", formats.percent(share), f"{size:,} weights")
    if metrics.removed_experts:
        _row(table, "experts whose weights are all zero", "", f"{len(metrics.removed_experts)} experts")
        _named(table, metrics.removed_experts)
    if metrics.unreached:
        _row(table, "reached by no calibration token", "", f"{len(metrics.unreached)} layers")
        _named(table, metrics.unreached)
    return table


def _named(table: Table, names: Sequence[str]) -> None:
    """A row for each of the first names, and where the others are."""
    for name in names[:NAMED]:
        _row(table, f"  {name}")
    if len(names) > NAMED:
        _row(table, "  … all in metrics.json")


def finetune_table(folder: Path) -> Table:
    """Quality dense, pruned and fine-tuned, and the outcome of the training.

    Raises:
        InvalidOption: as :func:`ecoflap.report.finetune_page.read_finetune`.
    """
    from ecoflap.report.finetune_page import MODELS, read_finetune, tests  # not before: it draws, too

    recipe, metrics = read_finetune(folder)
    table = _table(str(recipe.get("model")), "", *(name.lower() for name in MODELS.values()), "gain")
    for test in tests(metrics):
        for number, line in enumerate(test.lines):
            _row(table, f"  {line.label}" if number else test.title, *line.values, line.gain)
    if not metrics.finetuned:
        _row(table, "quality", *(formats.MISSING for _ in MODELS))
    table.add_section()
    training, percent = metrics.training, formats.percent
    losses = dict(training.held_out)
    before, after = (losses.get(step) for step in (0, training.best))
    shown = [formats.MISSING if loss is None else formats.significant(loss, 4) for loss in (before, after)]
    _row(table, "held-out loss", "", *shown)
    _row(table, "sparsity, prunable weights", "", "", percent(metrics.sparsity.prunable))
    _row(table, "steps", "", "", f"{training.steps:,} of {training.planned:,}")
    if training.best != training.steps:
        _row(table, "  the weights are those after", "", "", f"{training.best:,}")
    return table


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
        _row(table, stage.name, formats.duration(stage.seconds), memory)
    seconds = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    _row(table, "all stages", formats.duration(sum(seconds) if seconds else None), "")
    return table


def bench_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """One table a model of what :func:`ecoflap.run.bench.bench` found."""
    machine = found["machine"]
    for model in found["models"]:
        cells = list(dict.fromkeys((row["threads"], row["batch"]) for row in model["speed"]))
        title = f"{model['model']} (kernels: {machine['kernels']}, {machine['processors']} processors)"
        heads = [f"{'1 thread' if threads == 1 else f'{threads} threads'}, batch {batch}" for threads, batch in cells]
        table = _table(title, "variant", "stored", "in memory", "load", *heads)
        speed = {(row["variant"], row["threads"], row["batch"]): row for row in model["speed"]}
        for variant in model["variants"]:
            name, stored, seconds = variant["variant"], variant["stored_bytes"], variant["load_seconds"]
            _row(
                table,
                name,
                "" if stored is None else f"{stored / 1e6:.1f} MB",
                f"{variant['resident_bytes'] / 1e6:.1f} MB",
                "" if seconds is None else f"{seconds:.2f} s",
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
