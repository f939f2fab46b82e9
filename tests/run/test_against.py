"""``ecoflap evaluate --against``: another model, a run, a file; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
from console import Command, llama_and_prose, questions
from safetensors.torch import load_file, save_file

from ecoflap.errors import InvalidOption
from ecoflap.evaluation.paired import Samples
from ecoflap.run.against import Reference, differences, read_references
from ecoflap.run.compare.record import StoredFile
from ecoflap.support.reading import checked

WINDOWS = ("--sequence-length", 12, "--limit", 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama``, ``other`` (with other weights), ``prose.txt``, ``blip2``, ``questions``."""
    folder = llama_and_prose(tmp_path_factory.mktemp("against"))
    picos.write_checkpoint("blip2_t5", folder / "blip2")
    questions(folder / "questions")
    (folder / "other").mkdir()
    for path in (folder / "llama").iterdir():
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "llama" / "model.safetensors")
    save_file({n: 0.5 * w for n, w in weights.items()}, folder / "other" / "model.safetensors", {"format": "pt"})
    return folder


def test_a_file_and_a_model_give_one_difference(run: Command, data: Path, tmp_path: Path) -> None:
    text = data / "prose.txt"
    run("evaluate", data / "other", "--test", text, *WINDOWS, "--output", "other.json", "--quiet").well()
    job = ("evaluate", data / "llama", "--test", text, *WINDOWS)
    shown = run(*job, "--against", "other.json", "--output", "own.json", "--batch-size", 2).well().out
    for place in ("other.json", text):  # both are read
        other = ("--against", "other.json", "--output", place, "--overwrite")
        run(*job, *other).refused(str(place), "is part of the input")
    by_model = json.loads(run(*job, "--against", data / "other", "--json").well().out)["perplexity"]
    ((name, pair),) = by_model["paired"].items()
    assert name == str(data / "other")
    own, other = (json.loads(Path(f"{n}.json").read_text())["results"]["perplexity"] for n in ("own", "other"))
    assert pair["difference"] == pytest.approx(own["value"] - other["value"])
    assert pair["n"] == pair["better"] + pair["worse"] == 5
    assert own["paired"] == {"other.json": pytest.approx(pair, rel=1e-5)}
    told = " ".join(shown.split())
    assert "change from other.json" in told
    assert f"{pair['better']} better, {pair['worse']} worse" in told


def test_a_runs_answers(run: Command, data: Path) -> None:
    asked = data / "questions" / "questions.jsonl"
    job = (
        "prune", data / "blip2", "--calibration", asked, "--samples", 4, "--criterion", "magnitude",
        "--importance", "uniform", "--sparsity", 0.8, "--test", asked, "-o", "run", "--quiet",
    )  # fmt: skip
    run(*job).well()
    test = ("evaluate", Path("run") / "model", "--task", "vqa", "--test", asked)
    pairs = json.loads(run(*test, "--against", "run", "--json").well().out)["vqa"]["paired"]
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert pairs["dense model of run"] == metrics["paired"]["vqa"]["dense"]
    assert pairs["pruned model of run"]["difference"] == 0
    assert (pairs["pruned model of run"]["better"], pairs["pruned model of run"]["p"]) == (0, 1.0)
    run(*test, "--limit", 5, "--against", "run", "--quiet").refused("can't be compared", "samples")
    text = ("evaluate", data / "llama", "--test", data / "prose.txt", *WINDOWS)
    run(*text, "--against", "run").refused("no scores of single samples of 'perplexity'")
    run(*text, "--against", "./rum").refused("no model folder")
    run(*text, "--against", "rum.json").refused("rum.json")


def written(folder: Path, **changed: Any) -> str:
    samples = {"scores": [1.0, 0.0], "index": [0, 1], "kinds": [], "tokens": []}
    result = {"metric": "accuracy", "settings": {"samples": 2}, "samples": {**samples, **changed}}
    (folder / "r.json").write_text(json.dumps({"format": 1, "results": {"vqa": result}}))
    return str(folder / "r.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"scores": [1.0]}, {"scores": []}, {"scores": [1e300, 0.0]}, {"scores": "ab"}, {"index": None},
        {"tokens": [0, 1]}, {"tokens": [3]}, {"kinds": ["a"]}, {"scores": [float("nan"), 1.0]}, {"more": 1},
    ],
)  # fmt: skip
def test_files_that_lie(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=r"r\.json") as caught:
        read_references(written(tmp_path, **changed), ["vqa"])
    assert "\n" not in str(caught.value)
    assert read_references(written(tmp_path), ["vqa"])["vqa"]["r.json"].samples.scores == [1.0, 0.0]


def test_samples_that_lie_in_a_comparisons_files() -> None:
    whole: dict[str, Any] = {
        "bytes": 1,
        "bits": 1.0,
        "samples": {"a": {"scores": [1.0, 0.5], "index": [0, 1], "tokens": [3, 4]}},
    }
    known = checked(whole, StoredFile, "a file").samples["a"]
    assert known == Samples([1.0, 0.5], [0, 1], [], [3, 4])
    assert checked({**whole, "samples": {"a": known}}, StoredFile, "a file").samples["a"] is known
    for field, value in (("index", [0]), ("tokens", [3]), ("tokens", [0, 1]), ("scores", [1e999, 0]), ("kinds", 5)):
        lying = {**whole, "samples": {"a": {**whole["samples"]["a"], field: value}}}
        with pytest.raises(InvalidOption, match=r"a file: samples\.a"):
            checked(lying, StoredFile, "a file")


def test_what_was_tested_in_another_way() -> None:
    own = Reference(Samples([1.0, 0.0], [0, 1]), {"data": "a/x.parquet", "batch_size": 8, "rule": "exact"})
    same = Reference(Samples([0.0, 1.0], [1, 0]), {"data": "b/x.parquet", "batch_size": 4, "rule": "exact"})
    assert differences("vqa", own, {"m": same})["m"]["difference"] == 0
    for setting, value in (("rule", "vqa"), ("data", "b/y.parquet"), ("prompt", "Q: {}")):
        other = Reference(same.samples, {**same.settings, setting: value})
        with pytest.raises(InvalidOption, match=f"{setting} is"):
            differences("vqa", own, {"m": other})
