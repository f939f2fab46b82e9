"""The pictures of a comparison: quality against sparsity with bands, and what each method costs; PNG and SVG.

All files that show a comparison: JSON, CSV, Markdown, plots, page; and the command that repeats it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from ecoflap.run.compare.folder import LINES, TABLE
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.compare.record import Cell, Comparison, Test
from ecoflap.run.compare.tables import as_csv, as_markdown, columns_of, mean_seconds
from ecoflap.run.names import COMPARISON, RECIPE
from ecoflap.run.pages import PAGES
from ecoflap.run.recipe import FILE_ONLY, flag_of
from ecoflap.support.files import write_atomically, write_json, write_text
from ecoflap.support.formats import shortened, significant, task_title, unit_of

_STYLE = {
    "svg.hashsalt": "ecoflap",  # the same comparison gives the same bytes
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}

_MARKERS = "osD^vP*Xh<>p"
_DASHES = ("-", "--", "-.", ":")
_WIDE = 8.0  # the largest and smallest value of a "less is better" metric this far apart want a logarithmic axis
STAGES = ("importance", "allocation", "pruning")
_COLOURS = ("#3b6ea5", "#8a8a8a", "#d98032")  # of the stages: blue, grey, orange differ in lightness too


def draw_quality(comparison: Comparison, folder: Path) -> None:
    """``quality.png`` and ``quality.svg``: a panel a test, a line a method, bands of ± the error, the dense model.

    The error is the standard deviation over the seeds, or the standard error of the test where there is one seed.
    """
    with rc_context(_STYLE):
        count = len(comparison.tests)
        figure = Figure(
            figsize=(4.9 * count + 2.4, 0.6 + max(3.6, 0.24 * len(comparison.methods))), layout="constrained"
        )
        panels = figure.subplots(1, count, squeeze=False)[0]
        for axes, test in zip(panels, comparison.tests, strict=True):
            _quality_panel(axes, comparison, test)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        seeds = len(comparison.seeds)
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "± one standard error of the test"
        panels[0].set_title(f"{shortened(comparison.model, 24)}: {spread}", loc="left", fontsize=10)
        _save(figure, folder, "quality")


def _quality_panel(axes: Axes, comparison: Comparison, test: Test) -> None:
    columns = columns_of(comparison, test)
    highest, lowest = -math.inf, math.inf
    for index, method in enumerate(comparison.methods):
        found = [(s, c[method.name]) for s, c in zip(comparison.sparsities, columns, strict=True) if method.name in c]
        colour = _colour(index)
        places, means = [s for s, _ in found], [summary.mean for _, summary in found]
        axes.plot(
            places, means, color=colour, marker=_MARKERS[index % len(_MARKERS)], markersize=4.5, linewidth=1.5,
            linestyle=_DASHES[index // 10 % len(_DASHES)], label=shortened(method.title, 44),
        )  # fmt: skip
        errors = [summary.error or 0.0 for _, summary in found]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(places) == 1:  # a band of no width
            axes.errorbar(places, means, yerr=errors, color=colour, capsize=3)
        highest, lowest = max([highest, *means]), min([lowest, *means])
    if test.dense.value is not None:
        axes.axhline(test.dense.value, color="#333333", linestyle="--", linewidth=1.0, label="dense")
        highest, lowest = max(highest, test.dense.value), min(lowest, test.dense.value)
    if not test.higher_is_better and lowest > 0 and highest / lowest > _WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 2)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif unit_of(test.metric, test.unit) == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_xticks(list(comparison.sparsities))
    axes.set_xticklabels([f"{sparsity:g}" for sparsity in comparison.sparsities])
    axes.set_xlabel("sparsity of the prunable weights")
    title = task_title(test.name, test.metric) + (" (%)" if unit_of(test.metric, test.unit) == "%" else "")
    axes.set_ylabel(title if test.higher_is_better else f"{title} (less is better)")


def draw_cost(comparison: Comparison, folder: Path) -> None:
    """``cost.png`` and ``cost.svg``: mean seconds of a cell's stages and peak memory, a bar a method.

    The evaluation is left out: it is the same work for all.
    """
    with rc_context(_STYLE | {"axes.grid.axis": "x"}):
        made = {m.name: [c for c in comparison.cells_of(m.name) if c.error is None] for m in comparison.methods}
        methods = [method for method in comparison.methods if made[method.name]]
        cells = [made[method.name] for method in methods]
        cuda = any(cell.peak_cuda_bytes is not None for group in cells for cell in group)
        figure = Figure(figsize=(10.5 if cuda else 8.5, 1.4 + 0.3 * len(methods)), layout="constrained")
        panels = figure.subplots(1, 3 if cuda else 2, sharey=True)
        _time_panel(panels[0], [shortened(method.title, 44) for method in methods], cells)
        _memory_panel(panels[1], "peak memory of the process (GB)", [_peak(g, "peak_memory_bytes") for g in cells])
        if cuda:
            _memory_panel(panels[2], "peak CUDA memory (GB)", [_peak(g, "peak_cuda_bytes") for g in cells])
        _save(figure, folder, "cost")


def _time_panel(axes: Axes, titles: Sequence[str], cells: Sequence[Sequence[Cell]]) -> None:
    left = [0.0] * len(titles)
    for stage, colour in zip(STAGES, _COLOURS, strict=True):
        widths = [mean_seconds(group, stage) or 0.0 for group in cells]
        axes.barh(range(len(titles)), widths, left=left, color=colour, height=0.65, label=stage)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{significant(total, 2)}", (total, row), xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds a cell (importance: of its one measurement)")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2, handlelength=1.0)


def _memory_panel(axes: Axes, label: str, values: Sequence[int | None]) -> None:
    widths = [(value or 0) / 1e9 for value in values]
    axes.barh(range(len(widths)), widths, color="#6a8f5a", height=0.65)
    for row, width in enumerate(widths):
        axes.annotate(significant(width, 3), (width, row), xytext=(3, 0), textcoords="offset points", va="center")
    axes.margins(x=0.18)
    axes.set_xlabel(label)


def _peak(cells: Sequence[Cell], field: str) -> int | None:
    return max((value for cell in cells if (value := getattr(cell, field)) is not None), default=None)


def _colour(index: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](index % 10)


def _save(figure: Figure, folder: Path, name: str) -> None:
    for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        write_atomically(
            folder / f"{name}.{kind}",
            lambda path, kind=kind, options=options: figure.savefig(path, format=kind, **options),  # type: ignore[misc]
        )


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write every file that shows ``comparison``; the table that people read comes last.

    Raises:
        StorageError: a file can't be written.
    """
    write_json(folder / COMPARISON, comparison.model_dump(mode="json"))
    write_text(folder / LINES, as_csv(comparison))
    draw_quality(comparison, folder)
    draw_cost(comparison, folder)
    PAGES.get("compare")(folder)
    write_text(folder / TABLE, as_markdown(comparison))


def command_of(grid: Grid, folder: Path) -> str:
    """``ecoflap compare`` with the options that are not the defaults, one a line, quoted for a POSIX shell.

    A grid with what no option can say is repeated from its own file.
    """
    values, defaults = grid.to_dict(), Grid.parse({}).to_dict()
    output = shlex.join(["--output", f"{folder.name}-again"])
    if any(values.get(field) for field in FILE_ONLY):
        return " \\\n  ".join(("ecoflap compare", shlex.join(["--recipe", str(folder / RECIPE)]), output))
    lines = ["ecoflap compare" + (f" {shlex.quote(grid.model)}" if grid.model else "")]
    for name, value in values.items():
        if name == "model" or (value == defaults[name] and name not in ("methods", "sparsities", "seeds")):
            continue
        flag = flag_of(name)
        if name in ("methods", "sparsities", "seeds"):
            lines.append(shlex.join([flag, ",".join(map(str, value))]))
        elif isinstance(value, bool):
            lines.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            lines += (shlex.join([flag, f"{key}={item}"]) for key, item in value.items())
        elif isinstance(value, list):
            lines += (shlex.join([flag, str(item)]) for item in value)
        elif value is not None:
            lines.append(shlex.join([flag, str(value)]))
    return " \\\n  ".join([*lines, output])
