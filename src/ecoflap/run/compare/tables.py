"""Prints a comparison as Markdown, and as tables on the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ecoflap.evaluation.paired import Paired
from ecoflap.run.compare.pairs import DENSE, UNIFORM
from ecoflap.run.compare.record import Cell, Comparison, Stored, Summary, Test, summarise
from ecoflap.support.formats import duration, metric_change, metric_value, paired_change, size, task_title

NOTHING = "—"


def as_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: a table per test, failed cells, cost, methods with papers, the command."""
    several = len(comparison.seeds) > 1
    spread = (
        f"mean ± standard deviation over the seeds {', '.join(map(str, comparison.seeds))}"
        if several
        else f"± one standard error of the test; seed {comparison.seeds[0]}"
    )
    parts = [f"# Methods compared on {_plain(comparison.model)}"]
    for test in comparison.tests:
        better = "more" if test.higher_is_better else "less"
        parts.append(f"## {_plain(task_title(test.name, test.metric))}")
        dense = _value(test, test.dense.value, test.dense.stderr)
        parts.append(f"Dense: {dense} (n = {test.dense.n}); {better} is better.")
        parts.append(_quality(comparison, test))
        for words, heads, rows in difference_rows(comparison, test):
            parts += [f"{words}:", _table(heads, [[_plain(row[0]), *row[1:]] for row in rows])]
    parts.append(
        f"Columns are sparsities, {spread}. Bold: the best of a column and all that are as good within error "
        f"({AS_GOOD})."
    )
    parts += _by_bytes(comparison)
    parts += _not_made(comparison)
    parts += ["## Cost", _cost(comparison)]
    parts.append(
        "Times are means over the cells; the importance was measured once per seed for all sparsities and criteria "
        "that share it. Memory is the whole process at its peak."
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", comparison.command)), default=0))
    parts += ["## Methods", _methods(comparison), "## How to repeat it", f"{fence}sh\n{comparison.command}\n{fence}"]
    return "\n\n".join(parts) + "\n"


AS_GOOD = (
    "they differ from it by no more than the standard error of the difference, paired over the samples; with several "
    "seeds, or where no score of single samples is known, by no more than √(a² + b²), a and b being the numbers after ±"
)
_WORDS = {
    DENSE: "Change from the dense model, on the same samples",
    UNIFORM: "Change from the same criterion with one sparsity for all layers, on the same samples",
}


def difference_rows(comparison: Comparison, test: Test) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Tables of paired differences: title, column heads, and rows of text."""
    for other, words in _WORDS.items():
        rows = []
        for method in comparison.methods:
            cells = []
            for sparsity in comparison.sparsities:
                pair = comparison.against(method.name, sparsity, test.name).get(other)
                own = comparison.summary(method.name, sparsity, test.name)
                cells.append(NOTHING if pair is None or own is None else _difference(test, pair, own.mean))
            if any(cell != NOTHING for cell in cells):
                rows.append([method.title, *cells])
        if rows:
            yield words, ["method", *(f"{sparsity:g}" for sparsity in comparison.sparsities)], rows


def _difference(test: Test, pair: Paired, value: float) -> str:
    reference = value - pair.difference
    change = metric_change(test.metric, reference, value, unit=test.unit)
    return change + paired_change(test.metric, pair, reference, unit=test.unit)


def columns_of(comparison: Comparison, test: Test) -> list[dict[str, Summary]]:
    """For each sparsity, the summaries of all methods that have results on ``test``."""
    return [comparison.column(sparsity, test) for sparsity in comparison.sparsities]


def shown(comparison: Comparison, test: Test, summary: Summary | None, cells: Sequence[Cell]) -> str:
    """One entry of the table: value ± error in the metric's unit, and the number of seeds if some failed."""
    if summary is None:
        return "not finite" if any(cell.error is None for cell in cells) else NOTHING
    text = _value(test, summary.mean, summary.error)
    seeds = len(comparison.seeds)
    return text if summary.seeds == seeds else f"{text} ({summary.seeds} of {seeds} seeds)"


def _quality(comparison: Comparison, test: Test) -> str:
    columns = columns_of(comparison, test)
    alike = [comparison.leaders(sparsity, test) for sparsity in comparison.sparsities]
    rows = []
    for method in comparison.methods:
        row = [_plain(method.title)]
        for sparsity, column, best in zip(comparison.sparsities, columns, alike, strict=True):
            cells = comparison.cells_of(method.name, sparsity)
            text = shown(comparison, test, column.get(method.name), cells)
            row.append(f"**{text}**" if method.name in best else text)
        rows.append(row)
    return _table(["method", *(f"{sparsity:g}" for sparsity in comparison.sparsities)], rows)


def _value(test: Test, value: float | None, error: float | None) -> str:
    return metric_value(test.metric, value, error, unit=test.unit)


@dataclass(frozen=True)
class StoredRow:
    """Models in one form: mean bytes, bits a weight, and results and differences from the dense model by test."""

    title: str
    form: str
    bytes: int
    bits: float
    figures: dict[str, Summary]
    pairs: dict[str, Paired]

    def of_test(self, test: Test) -> tuple[str, str]:
        """A test's value and its change from the dense model, as text."""
        found, pair = self.figures.get(test.name), self.pairs.get(test.name)
        if found is None:
            return NOTHING, NOTHING
        change = NOTHING if pair is None else _difference(test, pair, found.mean)
        return _value(test, found.mean, found.error), change


def stored_rows(comparison: Comparison) -> Iterator[StoredRow]:
    """Rows of models in their stored forms, the largest first."""
    rows: list[StoredRow] = []
    for form, one in comparison.dense_stored.items():
        pairs = comparison.stored_against(None, None, form)
        rows.append(StoredRow("dense", form, one.bytes, one.bits, _figures([one]), pairs))
        for method in comparison.methods:
            for sparsity in comparison.sparsities:
                cells = comparison.cells_of(method.name, sparsity)
                if found := [cell.stored[form] for cell in cells if form in cell.stored]:
                    size = sum(stored.bytes for stored in found) // len(found)
                    bits = sum(stored.bits for stored in found) / len(found)
                    title = f"{method.title} at {sparsity:g}"
                    pairs = comparison.stored_against(method.name, sparsity, form)
                    rows.append(StoredRow(title, form, size, bits, _figures(found), pairs))
    yield from sorted(rows, key=lambda row: -row.bytes)


def _figures(found: Sequence[Stored]) -> dict[str, Summary]:
    names = dict.fromkeys(name for one in found for name in one.tests)
    all_of = {name: summarise([one.tests[name] for one in found if name in one.tests]) for name in names}
    return {name: summary for name, summary in all_of.items() if summary is not None}


def _by_bytes(comparison: Comparison) -> list[str]:
    """The table of pruned, quantised, and pruned and quantised models."""
    if not comparison.dense_stored:
        return []
    rows = [
        [_plain(row.title), row.form, f"{row.bytes / 1e6:.2f}", f"{row.bits:.2f}"]
        + [text for test in comparison.tests for text in row.of_test(test)]
        for row in stored_rows(comparison)
    ]
    of_tests = [head for test in comparison.tests for head in (_plain(test.name), "change from dense")]
    heads = ["model", "values", "MB", "bits a weight", *of_tests]
    words = (
        "Bytes of the prunable weights: pruned models packed, the dense one quantised by torchao without data. Changes "
        "are from the dense model as it was loaded, on the same samples."
    )
    return ["## By stored bytes", words, _table(heads, rows)]


def _not_made(comparison: Comparison) -> list[str]:
    """Cells without a result; one line for each reason."""
    reasons: dict[tuple[str, str], dict[float, None]] = {}
    for cell in comparison.cells:
        if cell.error is not None:
            reasons.setdefault((cell.method, cell.error), {})[cell.sparsity] = None
    lines = [
        f"- {_plain(method)} at {', '.join(f'{sparsity:g}' for sparsity in found)}: {_plain(error)}"
        for (method, error), found in reasons.items()
    ]
    return ["## What could not be made", "\n".join(lines)] if lines else []


def _cost(comparison: Comparison) -> str:
    cuda = any(cell.peak_cuda_bytes is not None for cell in comparison.cells)
    stages = ("importance", "allocation", "pruning", "evaluation")
    heads = ["method", *stages, "peak memory", *(["peak CUDA memory"] if cuda else [])]
    rows = []
    for method in comparison.methods:
        cells = [cell for cell in comparison.cells_of(method.name) if cell.error is None]
        row = [_plain(method.title), *(_seconds(cells, stage) for stage in stages)]
        row.append(_most(cells, lambda cell: cell.peak_memory_bytes))
        rows.append(row + ([_most(cells, lambda cell: cell.peak_cuda_bytes)] if cuda else []))
    return _table(heads, rows)


def mean_seconds(cells: Iterable[Cell], stage: str) -> float | None:
    """Mean seconds of a stage over the cells; None without cells."""
    values = [float(getattr(cell.seconds, stage)) for cell in cells]
    return sum(values) / len(values) if values else None


def _seconds(cells: Sequence[Cell], stage: str) -> str:
    mean = mean_seconds(cells, stage)
    return NOTHING if mean is None else "0" if mean == 0 else duration(mean)


def _most(cells: Sequence[Cell], of: Callable[[Cell], int | None]) -> str:
    values = [value for cell in cells if (value := of(cell)) is not None]
    return size(max(values)) if values else NOTHING


def _methods(comparison: Comparison) -> str:
    from ecoflap.run.citations import paper

    rows = []
    for method in comparison.methods:
        papers = [known for key in method.citations if (known := paper(key)) is not None]
        links = "; ".join(f"[{_plain(known.short)}]({known.url})" for known in papers)
        rows.append([_plain(method.title), _plain(method.name), links or NOTHING])
    return _table(["method", "as the command writes it", "papers"], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text escaped for Markdown, also in tables."""
    for mark in "\\|*_<>[]`":
        text = text.replace(mark, f"&#{ord(mark)};")
    return " ".join(text.split())


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """Tables of methods by sparsities; the best methods of a column, within error, are bold."""
    for test in comparison.tests:
        dense = metric_value(test.metric, test.dense.value, test.dense.stderr, unit=test.unit)
        title = Text(f"{task_title(test.name, test.metric)}, dense {dense}")
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("method")
        for sparsity in comparison.sparsities:
            table.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
        columns = columns_of(comparison, test)
        alike = [comparison.leaders(sparsity, test) for sparsity in comparison.sparsities]
        for method in comparison.methods:
            row = [Text(method.title)]
            for sparsity, column, best in zip(comparison.sparsities, columns, alike, strict=True):
                text = shown(comparison, test, column.get(method.name), comparison.cells_of(method.name, sparsity))
                row.append(Text(text, style="bold" if method.name in best else ""))
            table.add_row(*row)
        yield table
        for words, heads, rows in difference_rows(comparison, test):
            table = Table(title=words, title_justify="left", title_style="bold")
            for number, head in enumerate(heads):
                table.add_column(head, justify="right" if number else "left")
            for cells in rows:
                table.add_row(*(Text(cell.replace("; ", "\n")) for cell in cells))
            yield table
    if comparison.dense_stored:
        table = Table(title="by stored bytes of the prunable weights", title_justify="left", title_style="bold")
        for head in ("model", "values"):
            table.add_column(head)
        of_tests = [head for test in comparison.tests for head in (test.name, "change from dense")]
        for head in ("MB", "bits a weight", *of_tests):
            table.add_column(head, justify="right", no_wrap=True)
        for one in stored_rows(comparison):
            texts = [text.replace("; ", "\n") for test in comparison.tests for text in one.of_test(test)]
            table.add_row(Text(one.title), one.form, f"{one.bytes / 1e6:.2f}", f"{one.bits:.2f}", *map(Text, texts))
        yield table
