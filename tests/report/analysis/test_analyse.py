"""ecoflap analyse from run to pictures: what it leaves, what it keeps, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from console import TEXT, Command, prose

import ecoflap
from ecoflap.errors import StorageError
from ecoflap.report.analysis import agreement, effects, run
from ecoflap.report.analysis.registry import ANALYSES
from ecoflap.run.directory import RunDirectory


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is made elsewhere: it takes longer than an analysis."""
    monkeypatch.setattr("ecoflap.report.write_report", lambda _: None)


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / "analysis" / f"{name}.json").read_text("utf-8"))


def test_what_is_there_is_kept(run: Command, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outcome,) = ecoflap.analyse(copy, "distributions").values()
    assert outcome.state == "done"
    path = copy / "analysis" / "distributions.json"
    first = path.read_bytes()
    (copy / "analysis" / "distributions.png").unlink()
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("the model ran"))
    again = run("analyse", copy, "--what", "distributions").well()
    assert "kept" in again.out
    assert (copy / "analysis" / "distributions.png").is_file()  # drawn again of what is kept
    assert path.read_bytes() == first
    monkeypatch.undo()
    data = json.loads(first)
    path.write_text(json.dumps({**data, "samples": 99}), "utf-8")
    assert ecoflap.analyse(copy, ["distributions"], overwrite=True)["distributions"].state == "done"
    assert path.read_bytes() == first  # the same bytes


def test_fewer_samples(copy: Path) -> None:
    ecoflap.analyse(copy, "distributions", samples=1)
    assert _json(copy, "distributions")["samples"] == 2  # one whole batch


def test_stopped_it_goes_on(copy: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    monkeypatch.setattr(effects, "Estimates", stop)
    stopped = run("analyse", copy, "--what", "distributions", "--what", "effects", "--quiet")
    assert stopped.code == 143
    assert "stopped; the same command goes on from here" in stopped.err
    monkeypatch.undo()
    found = ecoflap.analyse(copy, ["distributions", "allocation"])  # done in the table's order
    assert [(name, one.state) for name, one in found.items()] == [("allocation", "done"), ("distributions", "kept")]


def test_a_run_without_answers_or_scores(run: Command, tmp_path: Path) -> None:
    model = picos.write_checkpoint("gpt2", tmp_path / "gpt2")
    text = prose(tmp_path / "prose.txt")
    prune = ("prune", model, *TEXT, "--criterion", "magnitude", "--importance", "uniform", "--quiet")
    run(*prune, "-o", "bare").well()
    found = json.loads(run("analyse", "bare", "--json").well().out)["analyses"]
    assert {name: one["state"] for name, one in found.items()} == {
        name: "done" if name == "allocation" else "skipped" for name in ANALYSES
    }
    assert "no calibration data" in found["landscape"]["note"]
    run("analyse", "bare", "--what", "landscape").refused("bare", "'landscape'", "no calibration data")
    run("analyse", "bare", "--what", "importance").refused("'importance'", "measured no importance")
    run("analyse", "bare", "--what", "before-after").refused("'before-after'", "scores its answers")
    run(*prune, "--calibration", text, "-o", "read").well()  # scores were not measured, but can be
    assert ecoflap.analyse("read", "effects")["effects"].state == "done"
    assert _json(Path("read"), "effects")["scores"] == "gradient-norm"


def test_a_measure_that_can_not_work_is_left_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecoflap.importance.gradient import FirstOrder

    few = ("zeroth-order", "owl", "first-order")
    monkeypatch.setattr(agreement, "IMPORTANCES", dict.fromkeys(few))

    def broken(*_: object) -> None:
        raise NotImplementedError("no derivative for aten::thing")

    monkeypatch.setattr(FirstOrder, "estimates", broken)
    outcome = ecoflap.analyse(copy, "agreement")["agreement"]
    data = _json(copy, "agreement")
    assert "first-order" not in data["measures"]
    assert data["measures"] == ["zeroth-order", "owl"]
    assert data["skipped"]["first-order"] == "no derivative for aten::thing"
    assert "without first-order: no derivative for aten::thing" in outcome.note


def test_refusals(run: Command, copy: Path, made: Path, tmp_path: Path) -> None:
    run("analyse", copy, "--what", "landscap").refused("analysis 'landscap'", "did you mean 'landscape'")
    run("analyse", tmp_path / "nothing").refused("nothing", "no run directory", "recipe.yaml")
    run("analyse", made / "data").refused("no run directory")
    run("analyse", copy, "--samples", 0).refused("--samples", "0", "greater than or equal to 1")
    assert "fewer than 99" in run("analyse", copy, "--samples", 99, "--what", "distributions").well().err
    run("analyse", copy, "--samples", "few").refused("--samples", "'few' is not a whole number")
    (copy / "analysis").mkdir(exist_ok=True)
    (copy / "analysis" / "effects.json").write_text('{"format": 1, "eff', "utf-8")
    run("analyse", copy, "--what", "effects").refused("effects.json", "no whole JSON")
    (copy / "analysis" / "effects.json").unlink()
    with RunDirectory(copy) as other:
        other.lock()
        run("analyse", copy).refused(str(copy), "another process is at work")
    (copy / "metrics.json").unlink()
    run("analyse", copy).refused("metrics.json", "has not ended", "--resume")


def test_a_picture_of_the_users_own_is_not_replaced(run: Command, copy: Path) -> None:
    mine = copy / "analysis" / "allocation.png"
    mine.parent.mkdir(exist_ok=True)
    mine.unlink(missing_ok=True)
    run("analyse", copy, "--what", "importance").well()
    mine.write_bytes(b"mine")
    run("analyse", copy, "--what", "allocation").refused("allocation.png was not written by ecoflap")
    assert mine.read_bytes() == b"mine"


def test_model_or_data_that_moved_or_changed(run: Command, copy: Path, made: Path, tmp_path: Path) -> None:
    recipe = copy / "recipe.yaml"
    before = recipe.read_text("utf-8")
    data = str(made / "data" / "questions.jsonl")
    recipe.write_text(before.replace(data, "gone.jsonl"), "utf-8")
    run("analyse", copy, "--quiet").refused("calibration data of", "gone.jsonl", "where the run was started")
    assert (copy / "analysis" / "allocation.png").is_file()  # what needs no data is done
    recipe.write_text(before.replace(str(made / "model"), str(tmp_path / "gone")), "utf-8")
    run("analyse", copy, "--what", "landscape").refused("the model of", "gone")
    other = picos.write_checkpoint("llava", tmp_path / "other", seed=1)
    recipe.write_text(before.replace(str(made / "model"), str(other)), "utf-8")
    run("analyse", copy, "--what", "landscape").refused("other", "has changed since the run", "fingerprint")
    recipe.write_text(before, "utf-8")
    shutil.rmtree(copy / "model")
    run("analyse", copy, "--what", "landscape").refused("the sparse model of", "model")


def test_a_comparison_is_no_run(run: Command, tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "recipe.yaml").write_text("methods: [wanda]\n", "utf-8")
    run("analyse", "grid").refused("grid", "comparison")


def test_a_full_disk_leaves_no_half_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        run.analyse(copy, "importance")
    assert not list((copy / "analysis").glob("*"))
