"""ecoflap analyse with no more options: every file that it leaves, and what is in them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from console import Command
from PIL import Image

from ecoflap.importance.registry import IMPORTANCES
from ecoflap.report.analysis.registry import ANALYSES

AGAIN = ("report.html", "manifest.json")  # written anew: what an analysis adds is on the page and in the list
MEASURED = ("distributions", "agreement", "effects", "landscape")


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / "analysis" / f"{name}.json").read_text("utf-8"))


@pytest.mark.slow
def test_everything_of_a_run(run: Command, copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name not in AGAIN}
    outcome = run("analyse", copy, "--quiet", "--json").well()
    found = json.loads(outcome.out)["analyses"]
    assert list(found) == list(ANALYSES)
    assert {one["state"] for one in found.values()} == {"done"}
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing of the run has changed
    for name, one in found.items():
        suffixes = {Path(file).suffix for file in one["files"]}
        assert suffixes == {".png", ".svg"} | ({".json"} if name in MEASURED else set())
        for file in map(Path, one["files"]):
            if file.suffix == ".png":
                with Image.open(file) as picture:
                    assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10  # something is drawn
            elif file.suffix == ".svg":
                ElementTree.parse(file)
    assert {path.name for path in (copy / "analysis").iterdir()} == {
        Path(file).name for one in found.values() for file in one["files"]
    }
    towers = set(_json(copy, "distributions")["towers"])
    assert len(towers) == 2
    agreement = _json(copy, "agreement")
    assert set(agreement["measures"]) | set(agreement["skipped"]) == {*IMPORTANCES} - {"uniform"}
    assert agreement["own"] == "gradient-norm"
    grid = agreement["spearman"]
    assert all(row[place] in (None, 1.0) for place, row in enumerate(grid))
    assert grid == [list(column) for column in zip(*grid, strict=True)]
    assert agreement["n"] == len({row["block"] for row in _read(copy, "allocation.json")["layers"]})
    assert set(_json(copy, "effects")["allocations"]["granularity"]["block"]) == towers
    assert _json(copy, "landscape")["samples"] == 2
    # The page was made again after the last analysis.
    assert (copy / "report.html").stat().st_mtime_ns >= (copy / "analysis" / "landscape.svg").stat().st_mtime_ns


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))
