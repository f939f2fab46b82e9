"""``compare.html``: one self-contained page, built from nothing but ``compare.json``.

The plots of a comparison: quality against sparsity, time and memory, each tower's sparsity; one look a method.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecoflap.report import records
from ecoflap.report.charts.chart import Axis, Chart, Rule, Series, log_ticks, style
from ecoflap.report.comparison import Cell, Comparison, Method, Test, mean, read_comparison
from ecoflap.report.html import Plots, environment
from ecoflap.support import formats
from ecoflap.support.citations import CITATIONS, Citation
from ecoflap.support.files import write_text

_CONTRAST = 20.0  # values whose largest is so many times the smallest are shown on a logarithmic scale
_LEAST = 0.02  # each way on an axis of differences: less has no whole per cent to mark
_GIGABYTE = 1e9


def quality_chart(content: Comparison, test: Test) -> Chart | None:
    """One line a method with the spread over seeds as a band, and the dense model as a dashed line."""
    share = formats.unit_of(test.metric, test.unit) == "%"
    dense = test.dense.value
    series = []
    everything = [] if dense is None else [dense]
    for index, method in enumerate(content.methods):
        points = [(sparsity, content.average(method.name, sparsity, test)) for sparsity in content.sparsities]
        known = [(s, a.mean, a.error or 0.0, a.seeds) for s, a in points if a.mean is not None]
        if not known:
            continue
        everything += [value for _, value, _, _ in known]
        hover = [
            f"{method.shown}\nsparsity {formats.percent(s)}: "
            + formats.metric_value(test.metric, value, spread or None, unit=test.unit)
            + (f"\n{seeds} seeds" if seeds > 1 else "")
            for s, value, spread, seeds in known
        ]
        low = [value - spread for _, value, spread, _ in known]
        high = [value + spread for _, value, spread, _ in known]
        x, y = [s for s, *_ in known], [value for _, value, _, _ in known]
        band = (low, high) if any(spread for _, _, spread, _ in known) else None
        series.append(Series(method.shown, "line", x, y, style(index), hover, band=band))
    if not series:
        return None
    log = not share and min(everything) > 0 and max(everything) / min(everything) > _CONTRAST
    axis = Axis(test.metric, percent=share)
    if log:  # a band that reaches zero has no place on this scale
        limits = min(everything) / 1.3, max(everything) * 1.3
        axis = Axis(test.metric, log=True, limits=limits, ticks=log_ticks(limits))
        series = [_above(line, limits[0]) for line in series]
    shown = formats.metric_value(test.metric, dense, unit=test.unit)
    rules = [] if dense is None else [Rule(dense, f"dense {shown}", 1)]
    return Chart(
        caption=f"{test.title} against sparsity",
        description=f"{test.metric} of {len(series)} methods at {len(content.sparsities)} sparsities; "
        "the table below has the numbers.",
        x=Axis("sparsity", percent=True, ticks=content.sparsities),
        y=axis,
        series=series,
        rules=rules,
        wide=True,
    )


def _above(line: Series, floor: float) -> Series:
    if line.band is None:
        return line
    low, high = line.band
    band = ([max(value, floor) for value in low], list(high))
    return Series(line.name, line.kind, line.x, line.y, line.style, line.hover, band=band)


def cost_charts(content: Comparison) -> list[Chart]:
    """Lying bars: mean seconds of a cell by stage, stacked; and the highest memory of a cell."""
    names = [method.shown for method in content.methods]
    cells = [content.of(method.name) for method in content.methods]
    charts = []
    stages = []
    for index, stage in enumerate(content.stages):
        values = [mean([cell.seconds.get(stage) for cell in own]) for own in cells]
        hover = [f"{n}\n{stage}: {formats.duration(value)}" for n, value in zip(names, values, strict=True)]
        stages.append(Series(stage, "bar", names, values, style(index), hover))
    if stages:
        totals = [mean([cell.total_seconds for cell in own]) for own in cells]
        charts.append(
            Chart(
                caption="Mean time of a cell by stage; importance is measured once a seed and shared",
                description="Mean time of a cell: "
                + "; ".join(f"{n} {formats.duration(total)}" for n, total in zip(names, totals, strict=True))
                + ".",
                x=Axis("seconds"),
                y=Axis(""),
                series=stages,
                horizontal=True,
                stacked=True,
            )
        )
    for title, field in (("Peak memory", "peak_memory_bytes"), ("Peak GPU memory", "peak_cuda_bytes")):
        peaks = [max((getattr(cell, field) or 0 for cell in own), default=0) for own in cells]
        if not any(peaks):
            continue
        words = [f"{n} {formats.size(peak) if peak else formats.MISSING}" for n, peak in zip(names, peaks, strict=True)]
        hover = [word.replace(f"{n} ", f"{n}\n", 1) for n, word in zip(names, words, strict=True)]
        charts.append(
            Chart(
                caption=title,
                description=f"{title}: {'; '.join(words)}.",
                x=Axis("GB"),
                y=Axis(""),
                series=[Series(title, "bar", names, [peak / _GIGABYTE for peak in peaks], style(0), hover)],
                horizontal=True,
            )
        )
    return charts


def tower_charts(content: Comparison) -> list[Chart]:
    """One plot a tower: its sparsity less the target, one line a method; at zero it loses just its share."""
    charts = []
    apart = [value - cell.sparsity for cell in content.cells for value in cell.towers.values() if value is not None]
    if not apart:
        return []
    low, high = min(*apart, -_LEAST), max(*apart, _LEAST)
    limits = low - 0.1 * (high - low), high + 0.1 * (high - low)
    for tower in content.towers:
        series = []
        for index, method in enumerate(content.methods):
            points = [(s, mean([c.towers.get(tower) for c in content.of(method.name, s)])) for s in content.sparsities]
            known = [(s, value) for s, value in points if value is not None]
            if known:
                hover = [f"{method.shown}\n{formats.percent(v)} of {tower} at {formats.percent(s)}" for s, v in known]
                x, y = [s for s, _ in known], [value - s for s, value in known]
                series.append(Series(method.shown, "line", x, y, style(index), hover))
        charts.append(
            Chart(
                caption=tower,
                description=f"Sparsity of {tower} less the target under {len(series)} methods at each target sparsity.",
                x=Axis("target sparsity", percent=True, ticks=content.sparsities),
                y=Axis("sparsity less target", percent=True, limits=limits),
                series=series,
                rules=[Rule(0.0, "the target", 2)],
            )
        )
    return charts


COMPARE = "compare.html"


def write_compare(folder: Path | str) -> Path:
    """Write ``compare.html`` into the output folder of ``ecoflap compare``, anew from its ``compare.json``.

    The same file gives the same bytes. Cells that are not there yet are said to be "not measured".

    Returns:
        The page's path.

    Raises:
        InvalidOption: the folder holds no ``compare.json``, or it is broken.
        StorageError: the page could not be written; an older page stays as it was.
    """
    content = read_comparison(folder)
    path = Path(folder) / COMPARE
    write_text(path, render(content))
    return path


def render(content: Comparison) -> str:
    """The page as text."""
    plots = Plots()
    tests = []
    for index, test in enumerate(content.each_test):
        chart = quality_chart(content, test)
        tests.append(
            {
                "title": test.title,
                "metric": test.metric,
                "better": "higher" if test.higher_is_better else "lower",
                "dense": formats.metric_value(test.metric, test.dense.value, test.dense.stderr, unit=test.unit),
                "n": test.dense.n,
                "panels": plots.group(f"quality{index}-", [chart] if chart else []),
                "rows": [_row(content, method, test) for method in content.methods],
            }
        )
    methods = {method.name: method.shown for method in content.methods}
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            content=content,
            model=content.model or "embedded VLM",
            tests=tests,
            tower_panels=plots.group("tower", tower_charts(content)),
            cost_panels=plots.group("cost", cost_charts(content)),
            methods=methods,
            papers=_papers(content),
            cuda=any(cell.peak_cuda_bytes for cell in content.cells),
            failed=[cell for cell in content.cells if cell.error],
            cells=list(_cells(content)),
            options=list(records.options(content.recipe)),
            records=list(records.records("", records.environment(content.recipe, content.environment))),
            **plots.context(),
        )
    )


def _row(content: Comparison, method: Method, test: Test) -> dict[str, Any]:
    """A method's line of a table: for each sparsity the mean, its text, and whether it is among the best."""
    cells = []
    for sparsity in content.sparsities:
        average = content.average(method.name, sparsity, test)
        text = formats.metric_value(test.metric, average.mean, average.error, unit=test.unit)
        cells.append(
            {
                "value": average.mean,
                "text": "failed" if average.mean is None and average.failures else text,
                "best": method.name in content.leaders(sparsity, test),
            }
        )
    return {"title": method.shown, "name": method.name, "cells": cells}


def _cells(content: Comparison) -> Iterator[tuple[Cell, list[tuple[float | None, str]]]]:
    """Every cell with the value and its text on each test."""
    for cell in content.cells:
        results = [(test, content.result(cell, test)) for test in content.each_test]
        yield (
            cell,
            [
                (one.value, formats.metric_value(test.metric, one.value, one.stderr, unit=test.unit))
                for test, one in results
            ],
        )


def _papers(content: Comparison) -> list[tuple[Citation, list[str]]]:
    """The papers behind the methods, each with the titles of the methods that it is behind."""
    found: dict[str, tuple[Citation, list[str]]] = {}
    for method in content.methods:
        for key in method.citations:
            if key in CITATIONS:
                paper = CITATIONS[key]
                found.setdefault(paper.key, (paper, []))[1].append(method.shown)
    return list(found.values())
