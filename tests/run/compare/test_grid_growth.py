"""A grid may grow when it is resumed, and nothing else of it may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import prose
from grids import failing, grid_of, table

from ecoflap.errors import InvalidOption, ResumeMismatch
from ecoflap.run.compare import grid as work
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import Comparison, read_comparison
from ecoflap.run.directory import RunFailed

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_grid_may_grow(whole: Comparison, data: Path, tmp_path: Path) -> None:
    small = grid_of(data, methods="zeroth-order+wanda", sparsities="0.7", seeds="1")
    run_grid(small, tmp_path / "grid")
    cells = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "grid" / "cells").iterdir()}
    (scores,) = (path.stat().st_mtime_ns for path in (tmp_path / "grid" / "importance").iterdir())
    assert len(cells) == 2  # the dense model's and one
    made = run_grid(grid_of(data), tmp_path / "grid", resume=True)
    assert table(made) == table(whole)
    for name, written in cells.items():
        assert (tmp_path / "grid" / "cells" / name).stat().st_mtime_ns == written
    assert scores in {path.stat().st_mtime_ns for path in (tmp_path / "grid" / "importance").iterdir()}
    assert read_comparison(tmp_path / "grid").methods == whole.methods
    with pytest.raises(ResumeMismatch, match="not now"):
        run_grid(small, tmp_path / "grid", resume=True)


def test_a_grid_that_is_struck_while_it_grows(
    whole: Comparison, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_grid(grid_of(data, seeds="0"), tmp_path / "grid")
    with monkeypatch.context() as patch:
        patch.setattr(work, "evaluate", failing(work.evaluate, 1))
        with pytest.raises(RunFailed):
            run_grid(grid_of(data), tmp_path / "grid", resume=True)
    assert not (tmp_path / "grid" / "compare.json").exists()  # that of the smaller grid would mislead
    assert table(run_grid(grid_of(data), tmp_path / "grid", resume=True)) == table(whole)


def test_a_finished_grid_is_left_as_it_is(whole: Comparison, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (data / "whole").rglob("*")}
    assert run_grid(grid_of(data), data / "whole", resume=True) == whole
    assert {path: path.stat().st_mtime_ns for path in (data / "whole").rglob("*")} == before


def test_overwrite_begins_again(data: Path, tmp_path: Path) -> None:
    run_grid(grid_of(data, seeds="0", methods="wanda,magnitude"), tmp_path / "grid")
    (tmp_path / "grid" / "notes.txt").write_text("mine", "utf-8")
    made = run_grid(grid_of(data, seeds="0", methods="wanda", samples=4), tmp_path / "grid", overwrite=True)
    assert len(made.cells) == 2
    assert len(list((tmp_path / "grid" / "cells").iterdir())) == 3
    assert (tmp_path / "grid" / "notes.txt").read_text("utf-8") == "mine"


def test_a_damaged_cell_is_named(data: Path, tmp_path: Path) -> None:
    grid = grid_of(data, seeds="0", methods="wanda")
    made = run_grid(grid, tmp_path / "grid")
    (tmp_path / "grid" / "compare.json").unlink()
    cell = tmp_path / "grid" / "cells" / "wanda_0.5_seed0.json"
    cell.write_text('{"method": 3}', "utf-8")
    with pytest.raises(InvalidOption, match=r"wanda_0\.5_seed0\.json is damaged: remove it"):
        run_grid(grid, tmp_path / "grid", resume=True)
    cell.unlink()
    assert table(run_grid(grid, tmp_path / "grid", resume=True)) == table(made)


def test_changed_data_is_refused(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_bytes((data / "prose.txt").read_bytes())
    run_grid(grid_of(data, calibration=str(text), seeds="0", methods="wanda"), tmp_path / "grid")
    prose(text, seed=5)
    with pytest.raises(ResumeMismatch, match="calibration data of seed 0"):
        run_grid(grid_of(data, calibration=str(text), seeds="0,1", methods="wanda"), tmp_path / "grid", resume=True)
