"""Writes a comparison as CSV, one row for each cell."""

from __future__ import annotations

import csv
import io

from ecoflap.run.compare.pairs import DENSE, UNIFORM
from ecoflap.run.compare.record import Cell, Comparison, MethodRecord, Test

# The first columns of compare.csv; docs/compare.md explains them.
COLUMNS = (
    "method", "importance", "criterion", "options", "sparsity", "seed", "task", "metric", "value", "stderr", "n",
    "dense", "dense_stderr", "achieved", "seconds_importance", "seconds_allocation", "seconds_pruning",
    "seconds_evaluation", "peak_memory_bytes", "peak_cuda_bytes", "error",
)  # fmt: skip


def as_csv(comparison: Comparison) -> str:
    """One row per cell, numbers in full precision; empty if nothing was measured.

    After the fixed columns: ``tower:NAME`` for each tower's sparsity, ``other:METRIC`` for further metrics of the first
    test, ``test:NAME`` and ``test:NAME:stderr`` for each further test, ``FORM:bytes``, ``FORM:value`` and
    ``FORM:stderr`` (first test) for each form that models were stored in, and the paired differences from the dense
    model and the uniform one: ``against:dense``, ``against:dense:stderr`` and so on, for further tests with the prefix
    ``test:NAME:``. They are over all seeds, so all rows of a method's seeds have the same.
    """
    towers = list(dict.fromkeys(name for cell in comparison.cells for name in cell.towers))
    others = list(dict.fromkeys(name for cell in comparison.cells for name in cell.others))
    tests = [test.name for test in comparison.tests[1:]]
    more = [f"tower:{name}" for name in towers] + [f"other:{name}" for name in others]
    more += [f"test:{name}{end}" for name in tests for end in ("", ":stderr")]
    forms = list(dict.fromkeys(form for cell in comparison.cells for form in cell.stored))
    more += [f"{form}:{what}" for form in forms for what in ("bytes", "value", "stderr")]
    pairs = [
        (test.name, other)
        for test in comparison.tests
        for other in (DENSE, UNIFORM)
        if _paired(comparison, test, other)
    ]
    for name, other in pairs:
        start = f"against:{other}" if name == comparison.tests[0].name else f"test:{name}:against:{other}"
        more += [start, *(f"{start}:{what}" for what in ("stderr", "better", "worse", "p"))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *more])
    methods = {method.name: method for method in comparison.methods}
    for cell in comparison.cells:
        row = [*_fixed(comparison, methods[cell.method], cell), *(cell.towers.get(name) for name in towers)]
        row += [cell.others[name].value if name in cell.others else None for name in others]
        for name in tests:
            found = cell.tests.get(name)
            row += [found and found.value, found and found.stderr]
        for form in forms:
            kept = cell.stored.get(form)
            first = kept and kept.tests.get(comparison.tests[0].name)
            row += [kept and kept.bytes, first and first.value, first and first.stderr]
        for name, other in pairs:
            pair = comparison.against(cell.method, cell.sparsity, name).get(other) if cell.error is None else None
            row += [None] * 5 if pair is None else [pair.difference, pair.stderr, pair.better, pair.worse, pair.p]
        writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()


def _paired(comparison: Comparison, test: Test, other: str) -> bool:
    return any(place.test == test.name and other in place.against for place in comparison.paired)


def _fixed(comparison: Comparison, method: MethodRecord, cell: Cell) -> list[object]:
    made = cell.error is None
    seconds = cell.seconds
    took = [seconds.importance, seconds.allocation, seconds.pruning, seconds.evaluation] if made else [None] * 4
    return [
        method.name, method.importance, method.criterion, method.name.partition(":")[2], cell.sparsity, cell.seed,
        comparison.task, comparison.metric, cell.value, cell.stderr, cell.n if made else None, comparison.dense.value,
        comparison.dense.stderr, cell.achieved, *took, cell.peak_memory_bytes, cell.peak_cuda_bytes, cell.error,
    ]  # fmt: skip
