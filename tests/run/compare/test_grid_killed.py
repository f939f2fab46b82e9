"""A comparison whose process was killed goes on as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from forks import ecoflap, forked
from grids import grid_of, table

from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import read_comparison


@pytest.mark.slow
def test_killed(data: Path) -> None:
    text = str(data / "prose.txt")
    job = ecoflap(
        data, "compare", data / "llama", "--calibration", text, "--test", text, "--test-samples", 3, "--samples", 6,
        "--importance-samples", 4, "--batch-size", 2, "--sequence-length", 12,
        "--methods", "wanda,zeroth-order+wanda", "--sparsities", "0.5:0.7:0.1", "--seeds", "0,1",
        "-o", "killed", "--resume", "--quiet",
    )  # fmt: skip
    cells = data / "killed" / "cells"
    with forked(job) as process:
        process.wait_until(lambda: len(list(cells.glob("*.json"))) >= 4)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.printed()
    assert not (data / "killed" / "compare.json").exists()
    grid = grid_of(data, methods="wanda,zeroth-order+wanda", sparsities="0.5:0.7:0.1")
    run_grid(grid, data / "killed", resume=True)
    whole = run_grid(grid, data / "undisturbed")
    assert table(read_comparison(data / "killed")) == table(whole)
    for kind in ("importance", "cells"):
        names = [sorted(path.name for path in (data / run / kind).iterdir()) for run in ("killed", "undisturbed")]
        assert names[0] == names[1]
