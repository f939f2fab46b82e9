"""Compares the answers before and after pruning: counts, and examples of each kind, from ``predictions.json``."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.report.analysis.registry import Analysis, NotApplicable
from ecoflap.report.charts.static import COLOURS, drawing
from ecoflap.report.predictions import Counts, Predictions, Row, TaskPredictions, picture_of
from ecoflap.report.reading import read_model
from ecoflap.run.names import PREDICTIONS
from ecoflap.run.predictions import KINDS, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject

COLUMNS = 4  # examples of a kind in the image; the page shows more
TITLES = dict(zip(KINDS, ("both right", "only dense right", "only pruned right", "both wrong"), strict=True))
_COLOURS = dict(zip(KINDS, (COLOURS[name] for name in ("c3", "c1", "c2", "c8")), strict=True))


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """An image for each task."""
    path = subject.path / PREDICTIONS
    found = read_model(path, Predictions)
    if found is None or not found.tasks:
        raise NotApplicable("no task of the run scores its answers")
    tasks = found.tasks
    stems = {name: "-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "task") for name in tasks}
    return {stems[name]: _figure(name, task, subject.path) for name, task in tasks.items()}


def _figure(name: str, task: TaskPredictions, folder: Path) -> Figure:
    from matplotlib.figure import Figure

    found = {kind: [row for row in task.rows if row.outcome == kind] for kind in KINDS}
    shown = {kind: rows for kind, rows in found.items() if rows}
    with drawing():
        figure = Figure(figsize=(8.4, 1.1 + 1.75 * len(shown)), layout="constrained")
        grid = figure.add_gridspec(1 + len(shown), COLUMNS, height_ratios=[0.55] + [1.75] * len(shown))
        _bar(figure.add_subplot(grid[0, :]), name, task.counts)
        for line, (kind, rows) in enumerate(shown.items(), 1):
            # Those with an image come first: they were chosen evenly from all rows.
            pictured = [row for row in rows if row.picture] or rows
            chosen = [pictured[place] for place in spread(range(len(pictured)), COLUMNS)]
            for column in range(COLUMNS):
                axes = figure.add_subplot(grid[line, column])
                axes.axis("off")
                if column < len(chosen):
                    _example(axes, chosen[column], folder)
                if column == 0:
                    axes.set_title(f"{TITLES[kind]} ({len(rows)})", color=_COLOURS[kind], fontweight="bold")
    return figure


def _bar(axes: Axes, name: str, found: Counts) -> None:
    counts = found.model_dump()
    total, left = found.total or 1, 0
    for kind in KINDS:
        axes.barh([0], [counts[kind]], left=left, color=_COLOURS[kind], label=f"{TITLES[kind]} {counts[kind]}")
        if counts[kind] > 0.06 * total:
            share = f"{100 * counts[kind] / total:.0f} %"
            axes.text(left + counts[kind] / 2, 0, share, ha="center", va="center", color="white")
        left += counts[kind]
    axes.set_xlim(0, total)
    axes.axis("off")
    axes.set_title(f"{name}: {total} samples", parse_math=False)
    axes.legend(ncols=4, loc="upper left", bbox_to_anchor=(0, 0.05), fontsize=8, handlelength=1, borderaxespad=0)


def _example(axes: Axes, row: Row, folder: Path) -> None:
    import matplotlib.image

    lines = textwrap.wrap(row.question or "", 30)[:2]
    lines += [f"truth: {_cut(row.truth)}", f"dense: {_cut(row.dense)}", f"pruned: {_cut(row.pruned)}"]
    content = picture_of(folder, row.picture)
    inside = content is not None
    if content is not None:
        axes.imshow(matplotlib.image.imread(io.BytesIO(content), format="png"))
    axes.text(0.5 if inside else 0, -0.04 if inside else 0.9, "\n".join(lines), transform=axes.transAxes, va="top",
              ha="center" if inside else "left", fontsize=7, parse_math=False)  # fmt: skip


def _cut(text: str) -> str:
    return textwrap.shorten(text, 28, placeholder=" …") or "(nothing)"


ANALYSIS = Analysis(draw)
