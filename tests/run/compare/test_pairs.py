"""Differences between the models of a comparison, against the samples in its cells."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invented import comparison
from rich.console import Console

from ecoflap.evaluation.paired import Samples
from ecoflap.report.compare_page import write_compare
from ecoflap.run.compare.pairing import with_pairs
from ecoflap.run.compare.pairs import Pairing, uniform_of
from ecoflap.run.compare.record import CellFile, Comparison, DenseTest, plain_test
from ecoflap.run.compare.rows import as_csv
from ecoflap.run.compare.tables import as_markdown, comparison_tables
from ecoflap.support.files import write_json


def test_a_grids_differences_are_those_of_its_cells(whole: Comparison, data: Path) -> None:
    """Two seeds: perplexities and losses are averaged over them."""
    assert len(whole.paired) == 4 * 2
    cells = [json.loads(path.read_text()) for path in (data / "whole" / "cells").glob("*_seed*.json")]
    dense = json.loads((data / "whole" / "cells" / "dense.json").read_text())[0]["samples"]["scores"]

    def losses(method: str, sparsity: float) -> list[list[float]]:
        found = [c for c in cells if (c["method"], c["sparsity"]) == (method, sparsity)]
        return [c["samples"]["perplexity"]["scores"] for c in sorted(found, key=lambda c: int(c["seed"]))]

    def perplexity(models: list[list[float]]) -> float:
        return statistics.fmean(math.exp(statistics.fmean(model)) for model in models)

    for pair in whole.paired:
        own = losses(pair.method, pair.sparsity)
        others = {"dense": [dense]}
        if pair.method.startswith("zeroth-order+wanda"):
            others["uniform"] = losses("wanda", pair.sparsity)
        assert pair.against.keys() == others.keys()  # no best: of several seeds the spread between them counts
        for name, other in others.items():
            found = pair.against[name]
            assert found.difference == pytest.approx(perplexity(own) - perplexity(other))
            mean_of = [[statistics.fmean(row) for row in zip(*side, strict=True)] for side in (own, other)]
            assert found.better == sum(a < b for a, b in zip(*mean_of, strict=True))
            assert found.worse == sum(a > b for a, b in zip(*mean_of, strict=True))
            assert found.n == len(dense) == 3


def test_which_uniform_model_is_the_baseline() -> None:
    def method(name: str, importance: str, criterion: str, **options: Any) -> Any:
        return SimpleNamespace(name=name, importance=importance, criterion=criterion, options=options)

    plain, recovered = method("wanda", "uniform", "wanda"), method("wanda:recover", "uniform", "wanda", recover=True)
    tokens = method("wanda:tokens", "uniform", "wanda", tokens="text")
    owl = method("owl", "owl", "wanda", recover=True, granularity="layer")
    other = method("owl+sparsegpt", "owl", "sparsegpt")
    assert uniform_of([plain, recovered, tokens, owl, other]) == {"owl": "wanda:recover"}
    assert uniform_of([plain, tokens, owl]) == {"owl": "wanda"}
    assert uniform_of([tokens, owl]) == {}


def paired_comparison() -> Comparison:
    """One seed; on samples that say so, owl+wanda is as good as the best at 0.5, and wanda is not."""
    base = comparison(seeds=1, failing=False)
    answers = {
        ("wanda", 0.5): [1, 0, 0, 0, 0, 0], ("owl+wanda", 0.5): [1, 0, 1, 1, 1, 0],
        (base.methods[2].name, 0.5): [0, 1, 1, 1, 1, 0],
    }  # fmt: skip
    cells = []
    for cell in base.cells:
        scores = [float(one) for one in answers.get((cell.method, cell.sparsity), [0, 0, 0, 0, 0, 1])]
        value = statistics.fmean(scores)
        tests = {"vqa": cell.tests["vqa"].model_copy(update={"value": value, "stderr": 0.001})}
        row = {**dict(cell), "value": value, "stderr": 0.001, "tests": tests}
        cells.append(CellFile(**row, samples={"vqa": Samples(scores, list(range(6)))}))
    dense = DenseTest(**dict(base.tests[0]), samples=Samples([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], list(range(6))))
    whole = base.model_copy(update={"cells": tuple(cells), "tests": (plain_test(dense),)})
    return with_pairs(whole, cells, [dense], {})


def test_the_best_and_those_as_good_by_pairs(tmp_path: Path) -> None:
    whole = paired_comparison()
    own = whole.against("owl+wanda", 0.5, "vqa")
    assert (own["best"].difference, own["best"].stderr) == (0.0, 0.0)  # the first of two alike
    other = whole.against(whole.methods[2].name, 0.5, "vqa")["best"]
    assert (other.difference, other.stderr) == (0.0, pytest.approx(math.sqrt(0.4 / 6)))
    assert own["dense"].difference == pytest.approx(0.0)
    assert (own["dense"].better, own["dense"].worse, own["dense"].p) == (1, 1, 1.0)
    assert (own["uniform"].difference, own["uniform"].better) == (pytest.approx(0.5), 3)
    assert whole.leaders(0.5, whole.tests[0]) == {"owl+wanda", whole.methods[2].name}
    assert whole.leaders(0.6, whole.tests[0]) == {method.name for method in whole.methods}
    for row in csv.DictReader(io.StringIO(as_csv(whole))):
        against = whole.against(row["method"], float(row["sparsity"]), "vqa")
        for other in ("dense", "uniform"):
            names = [f"against:{other}", *(f"against:{other}:{what}" for what in ("stderr", "better", "worse", "p"))]
            pair = against.get(other)
            wanted = [] if pair is None else [pair.difference, pair.stderr, pair.better, pair.worse, pair.p]
            assert [float(row[name]) for name in names if row[name]] == wanted
    text = as_markdown(whole)
    assert "Change from the dense model, on the same samples:" in text
    told = "+50.0 points ± 22; 3 better, 0 worse, p = 0.25"
    assert told in text.partition("Change from the same criterion with one sparsity")[2]
    console = Console(width=160, record=True, file=(tmp_path / "null").open("w"))
    for table in comparison_tables(whole):
        console.print(table)
    shown = console.export_text()
    assert "3 better, 0 worse, p = 0.25" in shown
    write_json(tmp_path / "compare.json", whole.model_dump(mode="json"))
    page = write_compare(tmp_path).read_text()
    assert page.count(told) == 1
    assert "change from one sparsity for all layers, on the same samples" in page


def test_older_comparisons_have_no_pairs(tmp_path: Path) -> None:
    old = comparison(seeds=1).model_dump(mode="json")
    del old["paired"]
    write_json(tmp_path / "compare.json", old)
    assert "on the same samples" not in write_compare(tmp_path).read_text()
    assert "on the same samples" not in as_markdown(Comparison.model_validate(old))
    assert Pairing(method="a", sparsity=0.5, test="b").against == {}
