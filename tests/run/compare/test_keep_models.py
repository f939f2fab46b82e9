"""``compare --keep-models`` and ``--keep best``: the models of cells, as ``prune`` would save them."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import model_weights
from grids import grid_of

from ecoflap.errors import InvalidOption
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.pipeline import run_recipe

pytestmark = pytest.mark.usefixtures("undrawn")


def _kept(folder: Path) -> set[str]:
    models = folder / "models"
    return {entry.name for entry in models.iterdir()} if models.exists() else set()


def test_all_are_kept_and_are_those_of_a_run(data: Path, tmp_path: Path) -> None:
    grid = grid_of(data, methods="wanda,magnitude", sparsities="0.5", seeds="0")
    run_grid(grid, tmp_path / "grid", keep="all")
    assert _kept(tmp_path / "grid") == {"wanda_0.5_seed0", "magnitude_0.5_seed0"}
    (place,) = (one for one in grid.places() if one.method.name == "wanda")
    run = run_recipe(grid.recipe_of(place), tmp_path / "run")
    first = model_weights(tmp_path / "grid" / "models" / "wanda_0.5_seed0")
    second = model_weights(run / "model")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in second)
    again = run_grid(grid, tmp_path / "grid", overwrite=True)  # they are the comparison's own files
    assert not _kept(tmp_path / "grid")
    assert len(again.cells) == 2


def test_the_best_of_each_sparsity_is_kept_also_when_the_grid_grows(data: Path, tmp_path: Path) -> None:
    run_grid(grid_of(data, methods="magnitude", sparsities="0.5", seeds="0"), tmp_path / "grid", keep="best")
    assert _kept(tmp_path / "grid") == {"magnitude_0.5_seed0"}
    grid = grid_of(data, methods="magnitude,wanda,sparsegpt", sparsities="0.5,0.7", seeds="0")
    made = run_grid(grid, tmp_path / "grid", resume=True, keep="best")
    best = {
        f"{cell.method}_{cell.sparsity}_seed0"
        for sparsity in (0.5, 0.7)
        for cell in [min((c for c in made.cells if c.sparsity == sparsity), key=lambda cell: cell.value or 0)]
    }
    assert _kept(tmp_path / "grid") == best


def test_another_choice_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="keep most: choose from none, all, best"):
        run_grid(grid_of(data), tmp_path / "grid", keep="most")
    assert not (tmp_path / "grid").exists()
