"""A comparison as tables on the terminal: one a test."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from ecoflap.comparison.record import Comparison, leaders
from ecoflap.comparison.tables import columns_of, shown
from ecoflap.report.formats import metric_value, task_title


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """Methods by sparsities; the best of a column and all as good within error are bold."""
    for test in comparison.tests:
        dense = metric_value(test.metric, test.dense.value, test.dense.stderr)
        title = Text(f"{task_title(test.name, test.metric)}, dense {dense}")
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("method")
        for sparsity in comparison.sparsities:
            table.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
        columns = columns_of(comparison, test)
        alike = [leaders(column, test.higher_is_better)[1] for column in columns]
        for method in comparison.methods:
            row = [Text(method.title)]
            for sparsity, column, best in zip(comparison.sparsities, columns, alike, strict=True):
                text = shown(comparison, test, column.get(method.name), comparison.cells_of(method.name, sparsity))
                row.append(Text(text, style="bold" if method.name in best else ""))
            table.add_row(*row)
        yield table
