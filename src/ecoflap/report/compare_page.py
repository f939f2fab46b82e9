"""Writes ``compare.html``, one self-contained page, from ``compare.json``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecoflap.report import records
from ecoflap.report.charts.compare import bytes_chart, cost_charts, quality_chart, tower_charts
from ecoflap.report.comparison import Cell, Comparison, Method, StoredModel, Test, read_comparison
from ecoflap.report.html import Plots, environment
from ecoflap.report.places import command_without_places, place_name, text_without_places, without_places
from ecoflap.run.citations import paper
from ecoflap.run.manifest import Manifest
from ecoflap.support import formats
from ecoflap.support.citations import Citation
from ecoflap.support.files import write_text

COMPARE = "compare.html"


def write_compare(folder: Path | str) -> Path:
    """Write ``compare.html`` into the output folder of ``ecoflap compare``, from its ``compare.json``; return its path.

    The same file gives the same bytes. Missing cells are shown as "not measured".

    Raises:
        InvalidOption: the folder holds no ``compare.json``, or it is broken.
        StorageError: the page could not be written; an older page is unchanged.
    """
    content = read_comparison(folder)
    path = Path(folder) / COMPARE
    with Manifest(Path(folder)).writing(COMPARE):
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
                "differences": list(_differences(content, test)),
            }
        )
    stored = [_stored(content, test, plots, index) for index, test in enumerate(content.each_test)]
    methods = {method.name: method.shown for method in content.methods}
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            content=content,
            model=place_name(content.model or "embedded VLM"),
            tests=tests,
            stored=[one for one in stored if one["rows"]],
            tower_panels=plots.group("tower", tower_charts(content)),
            cost_panels=plots.group("cost", cost_charts(content)),
            methods=methods,
            papers=_papers(content),
            cuda=any(cell.peak_cuda_bytes for cell in content.cells),
            failed=[cell for cell in content.cells if cell.error],
            command=command_without_places(content.command or ""),
            cells=list(_cells(content)),
            options=list(records.options(without_places(content.recipe))),
            records=list(records.records("", records.environment(content.recipe, content.environment))),
            **plots.context(),
        )
    )


def _row(content: Comparison, method: Method, test: Test) -> dict[str, Any]:
    """A method's row of a table: for each sparsity the mean, its text, and whether it is among the best."""
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
    return {"title": method.shown, "name": text_without_places(method.name), "cells": cells}


def _differences(content: Comparison, test: Test) -> Iterator[dict[str, Any]]:
    """The tables of paired differences of a test: from the dense model, and from one sparsity for all layers."""
    for other, words in (("dense", "the dense model"), ("uniform", "one sparsity for all layers")):
        rows = []
        for method in content.methods:
            cells = []
            for sparsity in content.sparsities:
                pair = content.against(method.name, sparsity, test).get(other)
                value = content.average(method.name, sparsity, test).mean
                text = ""
                if pair is not None and value is not None:
                    reference = value - pair.difference
                    text = formats.metric_change(test.metric, reference, value, unit=test.unit)
                    text += formats.paired_change(test.metric, pair, reference, unit=test.unit)
                cells.append({"value": None if pair is None else pair.difference, "text": text})
            if any(cell["text"] for cell in cells):
                rows.append({"title": method.shown, "name": text_without_places(method.name), "cells": cells})
        if rows:
            yield {"name": other, "words": words, "rows": rows}


def _stored(content: Comparison, test: Test, plots: Plots, index: int) -> dict[str, Any]:
    """A test's plot and table by stored bytes, the largest model first."""
    chart = bytes_chart(content, test)
    rows = []
    for model in sorted(content.by_bytes(test), key=lambda model: -model.bytes):
        found = model.average
        text = formats.metric_value(test.metric, found.mean, found.error, unit=test.unit)
        title = model.title if model.sparsity is None else f"{model.title} at {formats.percent(model.sparsity)}"
        rows.append({"model": model, "title": title, "value": found.mean, "text": text, **_change(test, model)})
    return {"title": test.title, "panels": plots.group(f"bytes{index}-", [chart] if chart else []), "rows": rows}


def _change(test: Test, model: StoredModel) -> dict[str, Any]:
    """The paired change of a stored model from the dense one: its difference and the text."""
    pair, value = model.pair, model.average.mean
    if pair is None or value is None:
        return {"difference": None, "change": ""}
    reference = value - pair.difference
    text = formats.metric_change(test.metric, reference, value, unit=test.unit)
    text += formats.paired_change(test.metric, pair, reference, unit=test.unit)
    return {"difference": pair.difference, "change": text}


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
    """The papers of the methods, each with the titles of its methods."""
    found: dict[str, tuple[Citation, list[str]]] = {}
    for method in content.methods:
        for key in method.citations:
            if (known := paper(key)) is not None:
                found.setdefault(key, (known, []))[1].append(method.shown)
    return list(found.values())
