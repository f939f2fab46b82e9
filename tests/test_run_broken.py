"""Runs broken at random file operations, again and again, by kills and full disks, end as an undisturbed one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from console import llama_and_prose, model_weights, same_result
from faults import DONE, FULL, KILLED, broken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecoflap.run import pipeline
from ecoflap.run.commands import measure_to
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.recipe import Recipe
from ecoflap.support.progress import Silent

pytestmark = pytest.mark.usefixtures("plain_page")

FEW = {"samples": 4, "batch_size": 2, "sequence_length": 12, "importance_samples": 2, "test_samples": 2}
BREAKS = st.lists(st.tuples(st.integers(1, 120), st.sampled_from(["kill", "full"])), min_size=1, max_size=4)
few = settings(max_examples=4, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    return llama_and_prose(folder)


def _recipe(folder: Path, **more: object) -> Recipe:
    text = str(folder / "prose.txt")
    return Recipe.parse({"model": str(folder / "llama"), "calibration": text, "test": text, **FEW, **more})


def _is_whole(run: Path) -> None:
    """Whatever is there under its own name can be read to its end."""
    for path in run.rglob("*.json") if run.exists() else ():
        json.loads(path.read_text("utf-8"))
    if (run / "recipe.yaml").exists():
        assert "fingerprint" in yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    if (run / "model").exists():
        assert model_weights(run / "model")
        assert (run / "model" / "tokenizer_config.json").exists()


def _broken_again_and_again(job: Callable[[], object], run: Path, breaks: list[tuple[int, str]]) -> None:
    shutil.rmtree(run, ignore_errors=True)
    for at, kind in breaks:
        ended = broken(job, run, at, kind)
        assert ended in (DONE, KILLED if kind == "kill" else FULL), (at, kind, ended)
        _is_whole(run)
        if ended == DONE:
            return
    job()


SEARCH = {"search": True, "search_options": {"rounds": 1, "granularity": "block", "swaps": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, SEARCH, {"criterion": "iterative-gradient"}], ids=["stages", "search", "rounds"])
def test_prune(made: Path, more: dict[str, object]) -> None:
    name = "-".join(("whole", *more))
    recipe = _recipe(made, **more)
    pipeline.run_recipe(recipe, made / name)
    run = made / "run"

    @few
    @given(BREAKS)
    @example([(1, "full"), (2, "kill"), (30, "kill"), (60, "full")])
    def check(breaks: list[tuple[int, str]]) -> None:
        _broken_again_and_again(lambda: pipeline.run_recipe(recipe, run, resume=True), run, breaks)
        same_result(made / name, run)
        assert not (run / "journal").exists()
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]

    check()


def test_importance(made: Path) -> None:
    recipe, output = _recipe(made, test=None, test_samples=None), made / "scores" / "importance.json"
    measure_to(recipe, made / "whole.json", Silent())

    @few
    @given(BREAKS)
    def check(breaks: list[tuple[int, str]]) -> None:
        def job() -> object:
            return measure_to(recipe, output, Silent(), resume=True)

        _broken_again_and_again(job, output.parent, breaks)
        assert output.read_bytes() == (made / "whole.json").read_bytes()
        assert [path.name for path in output.parent.iterdir()] == ["importance.json"]

    check()


@pytest.mark.slow
def test_compare(made: Path) -> None:
    text = str(made / "prose.txt")
    grid = Grid.parse(
        {"model": str(made / "llama"), "calibration": text, "test": text, **FEW,
         "methods": "wanda,zeroth-order+wanda", "sparsities": "0.5"}
    )  # fmt: skip
    whole = run_grid(grid, made / "whole-table")

    @settings(few, max_examples=3)
    @given(BREAKS)
    def check(breaks: list[tuple[int, str]]) -> None:
        folder = made / "table"
        _broken_again_and_again(lambda: run_grid(grid, folder, resume=True), folder, breaks)
        again = run_grid(grid, folder, resume=True)
        for one, other in zip(whole.cells, again.cells, strict=True):
            assert (one.value, one.achieved, one.towers) == (other.value, other.achieved, other.towers)

    check()
