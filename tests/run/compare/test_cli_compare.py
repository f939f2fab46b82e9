"""``ecoflap compare`` on the command line: what it prints, and one line for every slip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console import TEXT, Command, llama_and_prose

METHODS = ("--methods", "wanda,magnitude")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    return llama_and_prose(folder)


@pytest.fixture
def compare(run: Command, data: Path) -> Command:
    text = data / "prose.txt"
    options = [data / "llama", "--calibration", text, "--test", text, "--test-samples", 3, *TEXT]
    return lambda *more: run("compare", *options, *more)


def test_a_table_the_files_and_nothing_to_do_again(compare: Command, tmp_path: Path) -> None:
    outcome = compare(*METHODS, "--sparsities", "0.4:0.5:0.1", "--seeds", "0,1").well()
    for word in ("perplexity", "wanda", "magnitude", "0.4", "0.5", "ecoflap-compare/compare.md", "compare.html"):
        assert word in outcome.out
    assert "calibration:" in outcome.err
    assert (tmp_path / "ecoflap-compare" / "compare.html").exists()
    again = compare(*METHODS, "--sparsities", "0.4:0.5:0.1", "--seeds", "0,1", "--resume").well()
    assert "nothing to resume" in again.err
    assert "wanda" in again.out
    compare(*METHODS, "--sparsities", "0.4:0.5:0.1", "--seeds", "0,1").refused("already holds a comparison", "--resume")
    compare(*METHODS, "--sparsities", "0.4", "--resume").refused("can't resume", "0.5 then, not now")
    grown = compare(*METHODS, "--methods", "sparsegpt", "--sparsities", "0.4,0.5", "--seeds", "0,1", "--resume").well()
    assert "sparsegpt" in grown.out
    repeated = (tmp_path / "ecoflap-compare" / "compare.md").read_text("utf-8").partition("```sh\n")[2]
    assert "--methods wanda,magnitude,sparsegpt" in repeated
    assert "--sparsities 0.4,0.5" in repeated


def test_json_and_quiet(compare: Command, tmp_path: Path) -> None:
    outcome = compare(*METHODS, "--sparsities", 0.5, "-o", "out", "--json").well()
    assert outcome.err == ""
    data = json.loads(outcome.out)
    assert data["folder"] == "out"
    assert [cell["method"] for cell in data["cells"]] == ["wanda", "magnitude"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["cells"] == data["cells"]
    quiet = compare(*METHODS, "--sparsities", 0.5, "-o", "out", "--overwrite", "--quiet").well()
    assert (quiet.out, quiet.err) == ("", "")


def test_its_recipe_repeats_it(compare: Command, run: Command, tmp_path: Path) -> None:
    compare(*METHODS, "--methods", "zeroth-order:draws=1", "--sparsities", 0.5, "-o", "first").well()
    run("compare", "--recipe", "first/recipe.yaml", "-o", "second", "--low-memory").well()
    first, second = (
        [cell["value"] for cell in json.loads((tmp_path / name / "compare.json").read_text("utf-8"))["cells"]]
        for name in ("first", "second")
    )
    assert first == second
    run("report", "first").well()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "wnda"], ["unknown method 'wnda'", "did you mean 'wanda'"]),
        (["--methods", "zeroth-order+wandaa"], ["unknown criterion", "did you mean 'wanda'"]),
        (["--methods", "wanda:granularity=blok"], ["granularity", "'block'"]),
        (["--methods", "zeroth-order:drws=2"], ["drws", "did you mean 'draws'"]),
        (["--methods", "zeroth-order:draws=many"], ["draws", "whole number"]),
        (["--methods", "zeroth-order+wanda:pattern=2:4"], ["pattern 2:4"]),
        (["--sparsities", "0.3:0.7"], ["FROM:TO:STEP"]),
        (["--sparsities", "1.5"], ["below 1"]),
        (["--seeds", "one"], ["seeds: 'one'"]),
        (["--max-sparsity", "0.2"], ["max_sparsity 0.2 is below"]),
        (["--task", "perplexty"], ["did you mean 'perplexity'"]),
        (["--samples", "x"], ["--samples"]),
        (["--overwrite", "--resume"], ["one of them"]),
        (["--recipe", "nowhere.yaml"], ["can't read the recipe"]),
        (["--importance-samples", "7"], ["importance_samples 7 is more than samples 6"]),
    ],
)
def test_one_line_for_a_slip(compare: Command, tmp_path: Path, options: list[str], words: list[str]) -> None:
    compare(*options).refused(*words)
    assert not (tmp_path / "ecoflap-compare").exists()


def test_options_that_are_no_options_here(compare: Command) -> None:
    for option in ("--importance", "--criterion", "--sparsity", "--allocation", "--seed"):
        compare(option, "x").refused(option)


def test_nothing_to_compare_by(run: Command, data: Path) -> None:
    run("compare", data / "llama", "--calibration", data / "prose.txt").refused("what to compare by", "--task")
