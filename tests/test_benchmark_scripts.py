"""Every benchmark script still fits the package: it imports, and explains itself."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "argparse" in path.read_text("utf-8"))


@pytest.fixture
def as_scripts_see_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What lies beside a script can be imported, and is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("COLUMNS", "100")
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.usefixtures("as_scripts_see_it")
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, as Python would run it: a process for each would take most of its time to import torch."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert not left.value.code
    assert capsys.readouterr().out.startswith("usage:")
