"""Tables and plots against figures computed here, and text that wants to break out of them."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import EVIL, comparison
from PIL import Image

from ecoflap.errors import InvalidOption
from ecoflap.evaluation import TASKS
from ecoflap.report.charts.compare import draw_comparison
from ecoflap.run.compare.leaders import leaders
from ecoflap.run.compare.record import (
    Comparison,
    Measured,
    Summary,
    higher_is_better,
    read_comparison,
    summarise,
)
from ecoflap.run.compare.rows import COLUMNS, as_csv
from ecoflap.run.compare.tables import as_markdown, comparison_tables
from ecoflap.support.files import write_json

_rows = st.lists(st.tuples(st.none() | st.floats(-1e6, 1e6), st.none() | st.floats(0, 10)), max_size=6)


@given(_rows)
def test_figures_over_the_seeds(rows: list[tuple[float | None, float | None]]) -> None:
    found = summarise([Measured(value=value, stderr=stderr) for value, stderr in rows])
    values = np.array([value for value, _ in rows if value is not None])
    if not len(values):
        assert found is None
        return
    assert found is not None
    assert found.seeds == len(values)
    assert math.isclose(found.mean, values.mean(), rel_tol=1e-9, abs_tol=1e-9)
    if len(values) > 1:
        assert math.isclose(found.error or 0.0, values.std(ddof=1), rel_tol=1e-6, abs_tol=1e-6)
    else:
        assert found.error == next(stderr for value, stderr in rows if value is not None)


@given(
    st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=6), st.booleans()
)
@settings(deadline=None)
def test_the_best_and_those_as_good(column: dict[str, tuple[int, int]], more: bool) -> None:
    best, alike = leaders({n: Summary(mean=m, error=e or None, seeds=1) for n, (m, e) in column.items()}, more)
    if not column:
        assert (best, alike) == (None, frozenset())
        return
    top = (max if more else min)(mean for mean, _ in column.values())
    assert best is not None
    assert column[best][0] == top
    own = column[best][1]
    expected = {n for n, (mean, error) in column.items() if (mean - top) ** 2 <= error**2 + own**2}
    assert alike == expected


@pytest.mark.parametrize("tests", [1, 2])
def test_csv_has_every_cell(tests: int) -> None:
    whole = comparison(tests=tests)
    rows = list(csv.DictReader(io.StringIO(as_csv(whole))))
    assert len(rows) == len(whole.cells) == 18
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    for row, cell in zip(rows, whole.cells, strict=True):
        assert (row["method"], float(row["sparsity"]), int(row["seed"])) == (cell.method, cell.sparsity, cell.seed)
        assert row["error"] == (cell.error or "")
        if cell.error:
            assert {row[name] for name in ("value", "stderr", "n", "seconds_pruning", "tower:vision")} == {""}
            continue
        assert float(row["value"]) == cell.value
        assert float(row["seconds_pruning"]) == cell.seconds.pruning
        assert int(row["peak_memory_bytes"]) == cell.peak_memory_bytes
        assert (row["tower:vision"], row["other:IR@1"], row["dense"]) == (str(cell.achieved), "0.25", "0.9")
        if tests == 2:
            assert float(row["test:perplexity"]) == cell.tests["perplexity"].value


def _tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text as rows of cells."""
    found, lines = [], markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("| ") and not lines[number - 1].startswith("|"):
            rows = []
            while number < len(lines) and lines[number].startswith("|"):
                rows.append([cell.strip() for cell in lines[number].strip("|").split("|")])
                number += 1
            found.append([rows[0], *rows[2:]])
    return found


def _number(text: str) -> float:
    return float(re.sub(r"[*%]", "", text.partition("±")[0]).strip())


@pytest.mark.parametrize("seed", range(5))
def test_markdown_against_means_computed_here(seed: int) -> None:
    whole = comparison(seed=seed)
    quality, cost, methods = _tables(as_markdown(whole))
    assert quality[0] == ["method", "0.5", "0.6"]
    for row, method in zip(quality[1:], whole.methods, strict=True):
        for text, sparsity in zip(row[1:], whole.sparsities, strict=True):
            values = [
                c.value
                for c in whole.cells
                if (c.method, c.sparsity) == (method.name, sparsity) and c.value is not None
            ]
            assert abs(_number(text) - 100 * np.mean(values)) < 0.051
            if len(values) > 1:
                assert f"± {100 * np.std(values, ddof=1):.1f}" in text
            else:
                assert "(1 of 3 seeds)" in text
    for column in (1, 2):  # the highest mean is bold
        best = max(quality[1:], key=lambda row: _number(row[column]))
        assert best[column].startswith("**")
    assert [len(row) for row in cost] == [6] * 4
    seconds = [c.seconds.pruning for c in whole.cells if c.method == "wanda"]
    assert abs(float(cost[1][3].split()[0]) - np.mean(seconds)) < 0.01
    assert "Sun et al. 2023" in methods[1][2]


def test_what_could_not_be_made_is_said_once() -> None:
    text = as_markdown(comparison())
    assert text.count("can't &#124; be") == 1
    assert "could not be made" in text
    assert "could not be made" not in as_markdown(comparison(failing=False))


def test_names_cannot_break_out_of_the_table() -> None:
    text = as_markdown(comparison())
    assert "<script>" not in text
    assert all(len(row) == len(table[0]) for table in _tables(text) for row in table)
    assert {row["method"] for row in csv.DictReader(io.StringIO(as_csv(comparison())))} >= {EVIL}


def test_a_command_cannot_break_out_of_its_block() -> None:
    text = as_markdown(comparison().model_copy(update={"command": "ecoflap compare 'a\n```\n<script>'"}))
    assert text.endswith("````sh\necoflap compare 'a\n```\n<script>'\n````\n")


def test_the_terminal_shows_every_method() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    whole = comparison(tests=2)
    tables = list(comparison_tables(whole))
    assert len(tables) == 2
    for table in tables:
        console.print(table)
    text = console.export_text()
    for method in whole.methods:
        assert method.title in text


@pytest.mark.parametrize(("seeds", "tests", "cuda"), [(1, 1, False), (3, 2, True)])
def test_plots_have_every_line(tmp_path: Path, seeds: int, tests: int, cuda: bool) -> None:
    whole = comparison(seeds=seeds, tests=tests, cuda=cuda)
    write_json(tmp_path / "compare.json", whole.model_dump(mode="json"))
    draw_comparison(tmp_path)
    for name in ("quality", "cost"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert len(np.unique(picture.astype(int) @ [1, 256, 65536])) > 20
        drawing = (tmp_path / f"{name}.svg").read_text("utf-8")
        assert "owl+wanda" in drawing
        assert "<script>" not in drawing
        before = (tmp_path / f"{name}.svg").read_bytes()
        draw_comparison(tmp_path)
        assert (tmp_path / f"{name}.svg").read_bytes() == before
    assert ("GPU" in (tmp_path / "cost.svg").read_text("utf-8")) == cuda


def test_a_method_without_any_cell_is_no_obstacle(tmp_path: Path) -> None:
    whole = comparison(seeds=1)
    gone = [
        c if c.method != EVIL else c.model_copy(update={"error": "no", "tests": {}, "value": None}) for c in whole.cells
    ]
    whole = whole.model_copy(update={"cells": tuple(gone)})
    write_json(tmp_path / "compare.json", whole.model_dump(mode="json"))
    draw_comparison(tmp_path)
    assert _tables(as_markdown(whole))[0][3][1:] == ["—", "—"]


def test_the_file_reads_back(tmp_path: Path) -> None:
    whole = comparison(tests=2)
    write_json(tmp_path / "compare.json", whole.model_dump(mode="json"))
    assert read_comparison(tmp_path) == whole
    with pytest.raises(InvalidOption, match=r"compare\.json"):
        read_comparison(tmp_path / "nowhere")
    write_json(tmp_path / "compare.json", {**whole.model_dump(mode="json"), "seeds": "x"})
    with pytest.raises(InvalidOption, match="seeds"):
        read_comparison(tmp_path)


def test_summaries_by_test() -> None:
    whole: Comparison = comparison(tests=2)
    values = [c.tests["perplexity"].value for c in whole.cells if (c.method, c.sparsity) == ("wanda", 0.5)]
    found = whole.summary("wanda", 0.5, "perplexity")
    assert found is not None
    assert math.isclose(found.mean, float(np.mean(np.array(values, dtype=float))))


def test_which_metrics_are_better_when_less() -> None:
    assert not any(map(higher_is_better, ("perplexity", "word_perplexity,none", "bits_per_byte,none", "loss")))
    assert all(map(higher_is_better, ("accuracy", "CIDEr", "TR@1", "acc_norm,none", "exact_match,none", "SPICE")))
    assert "perplexity" in TASKS
