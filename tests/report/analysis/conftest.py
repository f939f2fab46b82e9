"""A complete run of a pico model for the tests of analyses, and the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import picos
import pytest
from console import Command, command, questions

from ecoflap.report.analysis import effects, landscape


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VLM, its data, and the run ``run``, which no test changes."""
    from ecoflap.run.pipeline import run_recipe
    from ecoflap.run.recipe import Recipe

    folder = tmp_path_factory.mktemp("analyse")
    picos.write_checkpoint("llava", folder / "model")
    data = questions(folder / "data", count=12)
    text = data.read_text("utf-8").replace("what color", "$x_1 <script>alert(1)</script> what color", 1)
    data.write_text(text, "utf-8")
    recipe = Recipe(model=str(folder / "model"), calibration=str(data), samples=4, importance_samples=4, batch_size=2,
                    criterion="wanda", test=str(data), sparsity=0.5)  # fmt: skip
    run_recipe(recipe, folder / "run")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The run again, to be analysed."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(landscape, "PLANE", (-1.0, 0.0, 1.0))
    monkeypatch.setattr(landscape, "LINE", (-1.0, -0.5, 0.0, 0.5, 1.0))
    for name, fewer in {"SEEDS": 2, "DRAWS": (1, 2), "EPSILONS": (1e-3, 1e-1)}.items():
        monkeypatch.setattr(effects, name, fewer)
    return command(capfd, monkeypatch)
