"""The grid on a pico model: the same numbers as single runs, shared work done once, cells that can't be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grids import METHODS, grid_of, table

import ecoflap
from ecoflap.errors import EcoflapError, InvalidOption, NonFiniteLoss, OutputExists, ResumeMismatch
from ecoflap.importance import base, zeroth_order
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.kept_weights import KeptWeights
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import Comparison, read_comparison
from ecoflap.run.compare.shared import key_of
from ecoflap.run.names import is_compare
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe
from ecoflap.search.pruned_model import Orders
from ecoflap.support.progress import Silent

pytestmark = pytest.mark.usefixtures("undrawn")


def test_all_cells_in_order_and_all_files(whole: Comparison, data: Path) -> None:
    order = [(cell.seed, cell.method, cell.sparsity) for cell in whole.cells]
    assert order == [(s, m, p) for s in (0, 1) for m in METHODS.split(",") for p in (0.5, 0.7)]
    assert all(cell.error is None and cell.value and cell.value > 1 for cell in whole.cells)
    assert (whole.task, whole.metric, whole.higher_is_better) == ("perplexity", "perplexity", False)
    names = {path.name for path in (data / "whole").iterdir()}
    assert names == {
        "compare.json", "compare.csv", "compare.md", "compare.html", "quality.png", "quality.svg", "cost.png",
        "cost.svg", "cells", "importance", "inputs.json", "log.txt", "recipe.yaml",
        "manifest.json",
    }  # fmt: skip
    assert is_compare(data / "whole")
    assert not is_compare(data)
    assert read_comparison(data / "whole") == whole


@pytest.mark.parametrize(
    ("method", "seed"), [("zeroth-order+wanda", 0), ("zeroth-order+sparsegpt", 1), ("magnitude", 0)]
)
def test_a_cell_is_what_prune_gives(whole: Comparison, data: Path, tmp_path: Path, method: str, seed: int) -> None:
    grid = grid_of(data)
    place = next(p for p in grid.places() if (p.method.name, p.sparsity, p.seed) == (method, 0.7, seed))
    recipe = grid.recipe_of(place)
    run = run_recipe(recipe, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    cell = next(c for c in whole.cells_of(method, 0.7) if c.seed == seed)
    # The grid's test samples are those of its own seed; a text's first windows are the same for all seeds.
    assert cell.value == metrics["pruned"]["perplexity"]["value"]
    assert cell.achieved == metrics["sparsity"]["prunable"]
    assert cell.towers == {name: tower["sparsity"] for name, tower in metrics["sparsity"]["towers"].items()}
    assert whole.dense.value == metrics["dense"]["perplexity"]["value"]


def test_the_dense_pass_is_shared(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, searched = [], []
    monkeypatch.setattr(base, "dense_norms", _counting(base.dense_norms, measured))
    monkeypatch.setattr(Orders, "_gathered", _counting(Orders._gathered, searched))
    method = "wanda:search=true,search_options=rounds=1"
    grid = grid_of(data, methods=f"owl+wanda,dlp+wanda,{method},owl+magnitude,{method},search_options=samples=2")
    made = run_grid(grid, tmp_path / "grid")
    # Once for each of the two seeds: OWL and DLP; four searches, all by the statistics of all samples.
    assert (len(measured), len(searched)) == (2, 2)
    last = [place for place in grid.places() if place.method.name.startswith("wanda")][-1]
    run = run_recipe(grid.recipe_of(last), tmp_path / "run")
    cell = next(c for c in made.cells if (c.method, c.sparsity, c.seed) == (last.method.name, last.sparsity, last.seed))
    assert cell.error is None
    assert cell.value == json.loads((run / "metrics.json").read_text("utf-8"))["pruned"]["perplexity"]["value"]
    alone = run_recipe(grid.recipe_of(next(p for p in grid.places() if p.method.name == "dlp+wanda")), tmp_path / "dlp")
    dlp = next((tmp_path / "grid" / "importance").glob("dlp-seed0-*.json"))
    scores = [json.loads(path.read_text("utf-8"))["layers"] for path in (alone / "importance.json", dlp)]
    assert scores[0] == scores[1]


def test_what_is_shared_is_done_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecoflap.run.compare import grid

    probes, evaluated, loaded = [], [], []
    monkeypatch.setattr(zeroth_order.ZerothOrder, "projection", _counting(zeroth_order.ZerothOrder.projection, probes))
    monkeypatch.setattr(grid, "evaluate", _counting(grid.evaluate, evaluated))
    monkeypatch.setattr(grid, "plan_on", _counting(grid.plan_on, loaded))
    made = run_grid(grid_of(data), tmp_path / "grid")
    # 14 matrices, 2 batches of 2 samples, the default number of draws: once for each of the two seeds.
    one = len(probes) // 2
    assert len(probes) == 2 * one
    assert one > 0
    assert one % 28 == 0 or one % 14 == 0
    assert len(evaluated) == 1 + len(made.cells)
    assert len(loaded) == 2
    assert len(list((tmp_path / "grid" / "importance").iterdir())) == 2
    seconds = {c.seconds.importance for c in made.cells if c.method.startswith("zeroth") and c.seed == 0}
    assert len(seconds) == 1
    assert seconds != {0.0}
    assert {c.seconds.importance for c in made.cells if c.method == "wanda"} == {0.0}


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_scores_do_not_depend_on_what_stage_2_counts(importance: str) -> None:
    choices: list[dict[str, Any]] = [
        {}, {"tokens": "text"}, {"tokens": "text+attended"}, {"tokens": "text+top", "top_tokens": 0.5},
    ]  # fmt: skip
    assert len({key_of(Recipe(importance=importance, **choice)) for choice in choices}) == 1
    others: list[dict[str, Any]] = [{"seed": 1}, {"samples": 64}, {"importance_samples": 16}]
    assert len({key_of(Recipe(importance=importance, **other)) for other in [{}, *others]}) == 4


def _counting(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return function(*arguments, **named)

    return wrapped


@pytest.mark.parametrize("low_memory", [False, True])
def test_every_cell_starts_from_the_dense_bits(
    whole: Comparison, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool
) -> None:
    seen: list[tuple[str, str]] = []
    restore = KeptWeights.restore

    def watched(self: KeptWeights) -> None:
        before = fingerprint(self._model)
        restore(self)
        seen.append((before, fingerprint(self._model)))

    monkeypatch.setattr(KeptWeights, "restore", watched)
    made = run_grid(grid_of(data, seeds="0"), tmp_path / "grid", low_memory=low_memory)
    assert len({after for _, after in seen}) == 1
    assert all(before != after for before, after in seen)  # each cell had really pruned
    assert table(made) == [row for row in table(whole) if row["seed"] == 0]


def test_cells_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    methods = "wanda,wanda:max_sparsity=0.6,wanda:pattern=2:4,zeroth-order+wanda:min_sparsity=0.6"
    made = run_grid(grid_of(data, methods=methods, seeds="0"), tmp_path / "grid")
    assert [cell.error for cell in made.cells_of("wanda")] == [None, None]
    capped = made.cells_of("wanda:max_sparsity=0.6")
    assert capped[0].error is None
    assert "max_sparsity 0.6 is below sparsity 0.7" in (capped[1].error or "")
    even = made.cells_of("wanda:pattern=2:4")
    assert even[0].error is None
    assert "fixes the sparsity at 0.5" in (even[1].error or "")
    floored = made.cells_of("zeroth-order+wanda:min_sparsity=0.6")
    assert floored[0].error
    assert floored[1].error is None
    text = (tmp_path / "grid" / "compare.md").read_text("utf-8")
    assert text.partition("Change from")[0].count("—") == 3
    assert "could not be made" in text


def test_a_method_that_fails_at_work_stops_no_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecoflap.importance.zeroth_order import ZerothOrder

    def broken(*_: object) -> float:
        raise NonFiniteLoss("the loss of batch 0 is nan")

    monkeypatch.setattr(ZerothOrder, "projection", broken)
    made = run_grid(grid_of(data, seeds="0"), tmp_path / "grid")
    errors = {cell.method: cell.error for cell in made.cells}
    assert errors["wanda"] is None
    assert errors["magnitude"] is None
    assert errors["zeroth-order+wanda"] == errors["zeroth-order+sparsegpt"] == "the loss of batch 0 is nan"


def test_several_tests_and_scores_from_a_file(whole: Comparison, data: Path, tmp_path: Path) -> None:
    text = str(data / "prose.txt")
    (scores,) = (data / "whole" / "importance").glob("zeroth-order-seed0-*.json")
    entries = [
        {"name": "near", "task": "perplexity", "test": text, "samples": 3},
        {"name": "far", "task": "perplexity", "test": text, "samples": 5},
    ]
    methods = f"{scores}+wanda,zeroth-order+wanda"
    grid = grid_of(data, test=None, test_samples=None, evaluations=entries, methods=methods, seeds="0")
    made = run_grid(grid, tmp_path / "grid")
    assert [test.name for test in made.tests] == ["near", "far"]
    read, measured = (table_of(made, name) for name in made_names(made))
    assert read == measured
    expected = {c.sparsity: c.value for c in whole.cells_of("zeroth-order+wanda") if c.seed == 0}
    assert {c.sparsity: c.tests["near"].value for c in made.cells_of("zeroth-order+wanda")} == expected
    assert {c.sparsity: c.value for c in made.cells_of("zeroth-order+wanda")} == expected
    assert "recipe.yaml" in made.command


def made_names(comparison: Comparison) -> list[str]:
    return [method.name for method in comparison.methods]


def table_of(comparison: Comparison, method: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "method"} for row in table(comparison) if row["method"] == method]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": "zeroth-order+wanda:pattern=2:4"}, "method 'zeroth-order+wanda:pattern=2:4'"),
        ({"methods": "zeroth-order+wanda:draws=0"}, "method 'zeroth-order+wanda:draws=0'"),
        ({"max_sparsity": 0.4}, "max_sparsity 0.4 is below"),
        ({"test": None, "test_samples": None}, "what to compare by"),
        ({"calibration": None}, "needs calibration data"),
        ({"importance_samples": 99}, "importance_samples 99 is more than samples 6"),
        ({"methods": "wanda:min_sparsity=0.9"}, "min"),
    ],
)
def test_refused_before_anything_is_written(data: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(EcoflapError) as caught:
        run_grid(grid_of(data, **more), tmp_path / "grid")
    assert words in str(caught.value)
    assert not (tmp_path / "grid").exists()


def test_a_folder_is_a_run_or_a_comparison(whole: Comparison, data: Path, tmp_path: Path) -> None:
    recipe = grid_of(data).recipe_of(next(grid_of(data).places()))
    for option in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputExists, match="no run of ecoflap"):
            run_recipe(recipe, data / "whole", **option)
    run_recipe(recipe, tmp_path / "run")
    for option in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputExists, match="no comparison of ecoflap"):
            run_grid(grid_of(data), tmp_path / "run", **option)
    with pytest.raises(OutputExists, match="already holds a comparison"):
        run_grid(grid_of(data), data / "whole")


def test_from_python(whole: Comparison, data: Path, tmp_path: Path) -> None:
    text = str(data / "prose.txt")
    made = ecoflap.compare(
        str(data / "llama"), ["wanda"], [0.5], [0], output=tmp_path / "out", calibration=text, test=text,
        test_samples=3, samples=6, importance_samples=4, batch_size=2, sequence_length=12,
    )  # fmt: skip
    (cell,) = made.cells
    assert cell.value == whole.cells_of("wanda", 0.5)[0].value
    with pytest.raises(InvalidOption, match="samples"):
        ecoflap.compare(samples=-1)


def test_what_may_not_change_on_resume(whole: Comparison, data: Path) -> None:
    for more, words in (
        ({"samples": 4}, "samples: 6 then, 4 now"),
        ({"methods": "wanda"}, "methods: zeroth-order+wanda"),
        ({"sparsities": "0.5"}, "sparsities: 0.7 then, not now"),
        ({"seeds": "0,2"}, "seeds: 1 then, not now"),
    ):
        with pytest.raises(ResumeMismatch, match="can't resume") as caught:
            run_grid(grid_of(data, **more), data / "whole", resume=True)
        assert words in str(caught.value)


def test_upop_is_a_method_that_takes_training_data(data: Path, tmp_path: Path) -> None:
    """Refused in one line without; its cell is what ``ecoflap upop`` gives, after the same tests."""
    with pytest.raises(InvalidOption, match=r"method 'upop' needs training data: give --train FILE"):
        run_grid(grid_of(data, methods="upop", sparsities="0.5", seeds="0"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(EcoflapError, match="option of method 'upop'"):
        grid_of(data, methods="upop:draws=3")
    given = {"epochs": 1, "train_samples": 8, "learning_rate": 3e-3}
    options = ",".join(f"{name}={value}" for name, value in given.items())
    grid = grid_of(
        data, methods=f"upop:{options},magnitude", sparsities="0.5", seeds="0", train=str(data / "prose.txt")
    )  # fmt: skip
    found = run_grid(grid, tmp_path / "grid")
    cell = found.cells[0]
    assert cell.error is None
    assert found.methods[0].citations == ("upop",)
    run = ecoflap.upop(
        str(data / "llama"), train=str(data / "prose.txt"), output=tmp_path / "run", task=["perplexity"],
        test=str(data / "prose.txt"), test_samples=3, batch_size=2, sequence_length=12, **given,
    )  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert cell.value == metrics["finetuned"]["perplexity"]["value"]
    assert cell.achieved == metrics["sparsity"]["prunable"]
    alone = run_grid(grid_of(data, methods="magnitude", sparsities="0.5", seeds="0"), tmp_path / "alone")
    assert found.cells[1].value == alone.cells[0].value  # nothing of the training is left in the dense model


class _StopsInSearch(Silent):
    """Progress that is told to stop at the second step of a search."""

    def __init__(self) -> None:
        self._left = 2

    def stage(self, name: str, total: int, done: int = 0) -> Any:
        return self if name == "search" else super().stage(name, total, done)

    def __enter__(self) -> _StopsInSearch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, *_: object) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt("SIGTERM")


def test_a_training_that_was_stopped_goes_on(data: Path, tmp_path: Path) -> None:
    grid = grid_of(
        data, methods="upop:epochs=1,train_samples=8,learning_rate=3e-3,evaluate_every=1", sparsities="0.5", seeds="0",
        train=str(data / "prose.txt"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, tmp_path / "grid", progress=_StopsInSearch())
    assert list((tmp_path / "grid" / "journal" / "trainings").rglob("masks.safetensors"))
    again, whole = run_grid(grid, tmp_path / "grid", resume=True), run_grid(grid, tmp_path / "whole")
    assert again.cells[0].error is None
    assert table(again) == table(whole)
