"""The one table that a run prints on the terminal when it ends."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ecoflap.report import formats
from ecoflap.report.data import Metrics, OtherMetric, Quality, RunData, read_run

NAMED = 8  # layers without tokens that the terminal lists; the rest are in metrics.json and on the page


def summary_table(run: RunData | Path | str) -> Table:
    """Dense against pruned quality, sparsity per tower, time and memory per stage.

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
        _row(
            table,
            formats.task_title(task, metric),
            formats.metric_value(metric, dense.value, dense.stderr),
            formats.metric_value(metric, pruned.value, pruned.stderr),
            formats.metric_change(metric, dense.value, pruned.value),
        )
        for other in dict.fromkeys([*dense.others, *pruned.others]):
            before, after = dense.others.get(other, OtherMetric()), pruned.others.get(other, OtherMetric())
            _row(
                table,
                f"  {other}",
                formats.metric_value(other, before.value, before.stderr),
                formats.metric_value(other, after.value, after.stderr),
                formats.metric_change(other, before.value, after.value),
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
    if metrics.unreached:
        _row(table, "by magnitude, since no token reached it", "", f"{len(metrics.unreached)} layers")
        for layer in metrics.unreached[:NAMED]:
            _row(table, f"  {layer}")
        if len(metrics.unreached) > NAMED:
            _row(table, "  … all in metrics.json")

    table.add_section()
    for stage in metrics.stages:
        memory = formats.size(stage.peak_memory_bytes)
        if stage.peak_cuda_bytes:
            memory += f" + {formats.size(stage.peak_cuda_bytes)} on the GPU"
        _row(table, f"time, {stage.name}", "", formats.duration(stage.seconds), f"peak {memory}")
    seconds = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    _row(table, "time, all stages", "", formats.duration(sum(seconds) if seconds else None))
    return table


def _row(table: Table, *cells: str) -> None:
    """Add a row of plain text: brackets in a name are no markup."""
    table.add_row(*(Text(cell) for cell in cells))
