"""Measures with a rule of their own through recipe, files and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
import yaml
from console import TEXT, Command, command, prose

from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.run.recipe import Recipe


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    picos.write_checkpoint("llama", tmp_path / "llama")
    prose(tmp_path / "prose.txt")
    return command(capfd, monkeypatch)


def spread_of(allocation: dict[str, Any]) -> tuple[float, float]:
    """Lowest and highest sparsity of a block."""
    blocks: dict[str, tuple[int, int]] = {}
    for row in allocation["layers"]:
        zeros, weights = blocks.get(row["block"], (0, 0))
        blocks[row["block"]] = (zeros + row["zeros"], weights + row["weights"])
    shares = [zeros / weights for zeros, weights in blocks.values()]
    return min(shares), max(shares)


def read(path: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    return data


def test_a_run_takes_the_rule_of_its_measure_and_no_cap(run: Command) -> None:
    data = ("--calibration", "prose.txt", *TEXT)
    run("prune", "llama", *data, "--importance", "dlp", "--sparsity", "0.6", "-o", "run", "-q").well()
    low, high = spread_of(read("run/allocation.json"))
    assert high - low == pytest.approx(0.3, abs=2e-3)
    assert high > 0.7  # above the cap of the proportional rule
    assert read("run/allocation.json")["rule"] == "linear"
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text("utf-8"))
    assert (recipe["rule"], recipe["spread"], recipe["aggregate"], recipe["max_sparsity"]) == (None, None, None, None)
    # Its scores, dealt again: by their own rule, by another spread, under a cap, by another rule.
    own = json.loads(run("allocate", "run", "--sparsity", "0.6", "-o", "own.json", "--json").well().out)
    assert [row["zeros"] for row in own["layers"]] == [row["zeros"] for row in read("run/allocation.json")["layers"]]
    run("allocate", "run/importance.json", "--spread", "0.02", "-o", "narrow.json", "-q").well()
    low, high = spread_of(read("narrow.json"))
    assert high - low == pytest.approx(0.04, abs=2e-3)
    run("allocate", "run", "--max-sparsity", "0.55", "-o", "capped.json", "-q").well()
    assert spread_of(read("capped.json"))[1] <= 0.55
    run("allocate", "run", "--rule", "proportional", "-o", "proportional.json", "-q").well()
    assert spread_of(read("proportional.json"))[1] <= 0.6
    # A run that takes the scores from the file takes their rule, too.
    again = ("--importance", "run/importance.json", "--criterion", "magnitude")
    run("prune", "llama", *data, *again, "--sparsity", "0.6", "-o", "again", "-q").well()
    assert read("again/allocation.json")["max_sparsity"] == 1
    assert spread_of(read("again/allocation.json")) == spread_of(read("run/allocation.json"))


def test_refusals_before_anything_is_measured(run: Command) -> None:
    data = ("--calibration", "prose.txt", *TEXT, "-o", "run")
    owl = ("prune", "llama", *data, "--importance", "owl")
    run(*owl, "--granularity", "layer").refused("scope=block", "scope=layer")
    run(*owl, "--importance-options", "multiple=many").refused("multiple=many", "a number")
    run(*owl, "--rule", "linaer").refused("unknown rule 'linaer'", "did you mean 'linear'")
    run(*owl, "--rule", "proportional", "--spread", "0.1").refused("spread 0.1", "'proportional' has no spread")
    run(*owl, "--spread", "1.5").refused("--spread", "1.5")
    assert not Path("run").exists()


def test_caps_that_a_recipe_resolves_to(tmp_path: Path) -> None:
    assert Recipe().resolved().max_sparsity == 0.6
    assert Recipe(importance="owl").resolved().max_sparsity is None
    assert Recipe(importance="owl", rule="proportional").resolved().max_sparsity == 0.6
    assert Recipe(rule="linear").resolved().max_sparsity is None
    assert Recipe(importance="alphapruning", max_sparsity=0.7).resolved().max_sparsity == 0.7
    for settings, cap in (({"rule": "linear"}, None), ({"rule": "proportional"}, 0.6), ({}, 0.6), (None, 0.6)):
        file = tmp_path / "importance.json"
        file.write_text(json.dumps({"settings": settings}), "utf-8")
        assert Recipe(importance=str(file)).resolved().max_sparsity == cap
    assert Recipe(importance=str(tmp_path / "nowhere.json")).resolved().max_sparsity == 0.6
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        Recipe.parse({"rule": "liner"})
    with pytest.raises(InvalidOption, match="spread"):
        Recipe.parse({"spread": 2})
