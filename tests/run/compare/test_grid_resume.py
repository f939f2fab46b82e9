"""A grid that was struck at any moment goes on and ends with the same table; nothing is measured twice."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from grids import failing, grid_of, table

from ecoflap.errors import InvalidOption
from ecoflap.importance import zeroth_order
from ecoflap.pruning import walk
from ecoflap.run.compare import grid as work
from ecoflap.run.compare.folder import GridDirectory
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import Comparison
from ecoflap.run.directory import RunFailed
from ecoflap.run.journal import SearchFile

pytestmark = pytest.mark.usefixtures("undrawn")

PLACES = [
    (GridDirectory, "write", 20),
    (walk._Walker, "prune_layers", 24),
    (zeroth_order.ZerothOrder, "projection", 84),
    (work, "evaluate", 17),
    (work, "write_results", 1),
    (work.KeptWeights, "restore", 16),
]


@pytest.mark.parametrize("number", range(6))
def test_struck_again_and_again(
    whole: Comparison, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    choose = random.Random(number)
    for owner, name, calls in (PLACES[number], choose.choice(PLACES)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), choose.randrange(calls)))
            with suppress(RunFailed):  # the second stroke may fall where nothing is left to do
                run_grid(grid_of(data), tmp_path / "grid", resume=True)
    made = run_grid(grid_of(data), tmp_path / "grid", resume=True)
    assert table(made) == table(whole)
    assert not (tmp_path / "grid" / "journal").exists()
    scores = sorted(path.name for path in (data / "whole" / "importance").iterdir())
    assert sorted(path.name for path in (tmp_path / "grid" / "importance").iterdir()) == scores


def test_nothing_is_measured_twice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = zeroth_order.ZerothOrder.projection
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", failing(probe, 30))
        with pytest.raises(RunFailed):
            run_grid(grid_of(data, seeds="0"), tmp_path / "grid")
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", lambda *a: (counted.append(1), probe(*a))[1])
        run_grid(grid_of(data, seeds="0"), tmp_path / "grid", resume=True)
    with monkeypatch.context() as patch:
        alone: list[int] = []
        patch.setattr(zeroth_order.ZerothOrder, "projection", lambda *a: (alone.append(1), probe(*a))[1])
        run_grid(grid_of(data, seeds="0"), tmp_path / "other")
    assert len(counted) == len(alone) - 30


def test_a_search_goes_on_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_of(
        data, methods="wanda:search=true,search_options=rounds=2,sensitivity+wanda", seeds="0", sparsities=0.7
    )
    undisturbed = run_grid(grid, tmp_path / "undisturbed")
    saved = SearchFile.save
    with monkeypatch.context() as patch:
        patch.setattr(SearchFile, "save", failing(saved, 1))
        with pytest.raises(RunFailed):
            run_grid(grid, tmp_path / "grid", resume=True)
    assert list((tmp_path / "grid" / "journal").glob("search-*.json"))
    assert table(run_grid(grid, tmp_path / "grid", resume=True)) == table(undisturbed)
    assert all(cell.error is None and cell.seconds.allocation > 0 for cell in undisturbed.cells)


def test_results_of_the_dense_model_that_are_of_other_tests(data: Path, tmp_path: Path, undrawn: None) -> None:
    small = {"methods": "magnitude", "sparsities": "0.5", "seeds": "0"}
    run_grid(grid_of(data, **small), tmp_path / "grid")
    (tmp_path / "grid" / "cells" / "dense.json").write_text("[]")
    with pytest.raises(InvalidOption, match=r"dense\.json is damaged: remove it"):
        run_grid(grid_of(data, **{**small, "sparsities": "0.5,0.6"}), tmp_path / "grid", resume=True)
