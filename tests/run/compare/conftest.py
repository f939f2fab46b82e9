"""Lets tests of this folder import what lies beside them; the model, the text and the whole grid that they share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from console import llama_and_prose
from grids import grid_of

from ecoflap.run.compare import results
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import Comparison


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``llama`` and ``prose.txt``."""
    folder = tmp_path_factory.mktemp("grid")
    return llama_and_prose(folder)


@pytest.fixture(scope="session")
def whole(data: Path) -> Comparison:
    """The grid, undisturbed, in the folder ``whole`` beside the data; no test changes it."""
    return run_grid(grid_of(data), data / "whole")


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and page, half of a small grid's time, are left out of grids that are looked at for their numbers."""
    if "whole" in request.fixturenames:
        request.getfixturevalue("whole")  # which has them
    monkeypatch.setattr(results, "PAGES", {name: lambda *_: None for name in ("compare", "compare-plots")})
