"""The uniform baseline beside a run: the same criterion with one sparsity for all layers, and the run as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
from console import model_weights, prose
from rich.console import Console

from ecoflap.cli.tables import summary_table
from ecoflap.errors import InvalidOption
from ecoflap.report.data import read_run
from ecoflap.report.page import render
from ecoflap.run import pipeline
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("baseline")
    text = str(prose(folder / "prose.txt"))
    return {
        "model": str(picos.write_checkpoint("llama", folder / "llama")), "calibration": text, "test": text,
        "samples": 4, "importance_samples": 4, "batch_size": 2, "sequence_length": 16, "test_samples": 6,
        "importance": "gradient-norm",
    }  # fmt: skip


def _metrics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text("utf-8"))
    return found


def test_it_is_the_uniform_run_and_leaves_the_run_as_it_was(made: dict[str, Any], tmp_path: Path) -> None:
    both = run_recipe(Recipe(**made, baseline=True), tmp_path / "both")
    alone = run_recipe(Recipe(**made), tmp_path / "alone")
    uniform = run_recipe(Recipe(**{**made, "importance": "uniform"}), tmp_path / "uniform")
    found = _metrics(both)
    assert found["baseline"] == _metrics(uniform)["pruned"]
    assert found["pruned"] == _metrics(alone)["pruned"]
    assert "baseline" not in _metrics(alone)
    first, second = model_weights(both / "model"), model_weights(alone / "model")
    assert all(first[name].equal(second[name]) for name in second)
    pair = found["paired"]["perplexity"]["baseline"]
    values = [found[name]["perplexity"]["value"] for name in ("pruned", "baseline")]
    assert pair["difference"] == pytest.approx(values[0] - values[1])
    assert pair["n"] == pair["better"] + pair["worse"] == 6
    assert pair["stderr"] > 0

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(both))
    table = console.export_text()
    page = render(read_run(both))
    card = (both / "model" / "README.md").read_text("utf-8")
    assert "one sparsity for all layers" in table
    assert "with one sparsity for all layers; against it" in page
    assert "with one sparsity for all layers; against it" in card
    for shown in (table, page, card):
        assert f"{pair['better']} better, {pair['worse']} worse" in shown
    assert "one sparsity for all layers" not in render(read_run(alone))


@pytest.mark.usefixtures("pageless")
def test_an_interrupted_baseline_goes_on_and_is_not_pruned_twice(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**made, baseline=True)
    whole = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_prune", lambda *_: (_ for _ in ()).throw(InvalidOption("hail")))
        with pytest.raises(InvalidOption, match="hail"):
            run_recipe(recipe, tmp_path / "run")
    monkeypatch.setattr(pipeline, "pruned_uniformly", lambda *_: pytest.fail("it was known"))
    run = run_recipe(recipe, tmp_path / "run", resume=True)
    assert _metrics(run)["baseline"] == _metrics(whole)["baseline"]
    first, second = model_weights(run / "model"), model_weights(whole / "model")
    assert all(first[name].equal(second[name]) for name in second)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"baseline": False}, False),
        ({"model": "x"}, False),
        ({"model": "x", "baseline": True}, True),
        ({"importance": "uniform"}, False),
        ({"importance": "uniform", "search": True}, True),
        ({"pattern": "2:4"}, False),
        ({"criterion": "global-magnitude", "baseline": True}, False),
    ],
)
def test_where_there_is_one(fields: dict[str, Any], expected: bool) -> None:
    assert Recipe(**fields).resolved().baseline is expected
