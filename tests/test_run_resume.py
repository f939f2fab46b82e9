"""An interrupted run goes on with --resume and ends with the same bits; a changed one is refused."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import picos
import pytest
import torch
import yaml
from console import TEXT, Command, prose, same_result
from forks import ecoflap, forked

from ecoflap.importance import zeroth_order
from ecoflap.pruning import walk
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.run.journal import BlockFiles, EstimateFile
from ecoflap.run.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data, and ``whole``: an undisturbed run."""
    from ecoflap.run.pipeline import run_recipe

    folder = tmp_path_factory.mktemp("resume")
    picos.write_checkpoint("llama", folder / "llama")
    prose(folder / "prose.txt")
    run_recipe(_recipe(folder), folder / "whole")
    return folder


def _recipe(folder: Path) -> Recipe:
    data = str(folder / "prose.txt")
    return Recipe(model=str(folder / "llama"), calibration=data, samples=6, batch_size=2, sequence_length=12,
                  importance="zeroth-order", importance_samples=4, criterion="wanda", test=data,
                  test_samples=3)  # fmt: skip


def _options(folder: Path) -> list[object]:
    data = folder / "prose.txt"
    return ["prune", folder / "llama", "--calibration", data, *TEXT, "--importance", "zeroth-order",
            "--criterion", "wanda", "--test", data, "--test-samples", 3]  # fmt: skip


@pytest.fixture
def prune(run: Command, made: Path) -> Command:
    return lambda *more: run(*_options(made), "-o", "run", *more)


class _Crash(Exception):
    pass


def _failing(function: Callable[..., object], at: int, error: BaseException) -> Callable[..., object]:
    """``function`` that raises ``error`` at its call number ``at`` (from 0)."""
    calls = iter(range(10**9))

    def wrapped(*arguments: object, **named: object) -> object:
        if next(calls) == at:
            raise error
        return function(*arguments, **named)

    return wrapped


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("at", [0, 1, 20, 41])
def test_a_crash_in_stage_1(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch:
        probe = zeroth_order.ZerothOrder.projection
        patch.setattr(zeroth_order.ZerothOrder, "projection", _failing(probe, at, _Crash("lightning")))
        outcome = prune()
    assert outcome.code == 1
    # What was chosen (calibration, objective), the dense evaluation's line of progress, and what happened.
    assert len(outcome.err.splitlines()) == 4
    assert "lightning" in outcome.err
    assert "--resume" in outcome.err
    assert "_Crash: lightning" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    journal = (tmp_path / "run" / "journal" / "importance.jsonl").read_bytes()
    assert len(journal.splitlines()) == at
    prune().refused("already holds a run", "--resume")
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(
            zeroth_order.ZerothOrder, "projection",
            lambda *a: (counted.append(1), probe(*a))[1],
        )  # fmt: skip
        prune("--resume").well()
    assert len(counted) == 42 - at  # nothing is measured twice
    same_result(made / "whole", tmp_path / "run")


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_crash_in_stage_2(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(walk._Walker, "prune_layers", _failing(walk._Walker.prune_layers, at, _Crash("thunder")))
        assert prune().code == 1
    assert len(list((tmp_path / "run" / "journal" / "blocks").glob("*.safetensors"))) == at
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["save", "write_report", "sparsity_summary"])
def test_a_crash_near_the_end(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from ecoflap.report import page
    from ecoflap.run import pipeline

    owner = page if name == "write_report" else pipeline
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _failing(getattr(owner, name), 0, _Crash("hail")))
        assert prune().code == 1
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "journal").exists()
    names = [stage["name"] for stage in json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))["stages"]]
    assert names == [
        "loading",
        "evaluation, dense",
        "importance",
        "pruning",
        "saving",
        "evaluation, pruned",
    ]  # each of them once


@pytest.mark.usefixtures("pageless")
def test_a_line_that_was_cut_off(prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        probe = zeroth_order.ZerothOrder.projection
        patch.setattr(zeroth_order.ZerothOrder, "projection", _failing(probe, 9, _Crash()))
        assert prune().code == 1
    path = tmp_path / "run" / "journal" / "importance.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert len(list(EstimateFile(path).estimates())) == 8
    for junk in (b"null\n", b"[1, 2]\n", b'["a", 0, 0, 5]\n', b'["a", 0, 0, "0x1p-3"]', b"\xff\n", b"\0" * 40):
        path.write_bytes(path.read_bytes() + junk)
        assert len(list(EstimateFile(path).estimates())) == 8, junk
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


@pytest.mark.usefixtures("pageless")
def test_a_damaged_block(prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(walk._Walker, "prune_layers", _failing(walk._Walker.prune_layers, 2, _Crash()))
        assert prune().code == 1
    path = tmp_path / "run" / "journal" / "blocks" / "model.layers.1.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "model.layers.1.safetensors is damaged" in prune("--resume").well().err
    same_result(made / "whole", tmp_path / "run")


def test_what_the_journal_keeps_is_exact(tmp_path: Path) -> None:
    from ecoflap.importance.scores import Estimate

    choose = random.Random(0)
    rows = [Estimate(f"layer.{i}", i, 2 * i, choose.gauss(0, 1) * 10 ** choose.randrange(-300, 300)) for i in range(50)]
    journal = EstimateFile(tmp_path / "j.jsonl")
    for row in rows:
        journal.append(row)
    journal.close()
    assert list(EstimateFile(tmp_path / "j.jsonl").estimates()) == rows
    blocks = BlockFiles(tmp_path / "blocks")
    weights = {"a.weight": torch.randn(3, 4).bfloat16(), "b.weight": torch.randn(4, 3).t()}
    assert blocks.load("a.b") is None
    blocks.save("a.b", PrunedBlock(weights, ("b.weight",)))
    loaded = blocks.load("a.b")
    assert loaded is not None
    assert loaded.unreached == ("b.weight",)
    assert all(
        torch.equal(loaded.weights[name], weight) and loaded.weights[name].dtype == weight.dtype
        for name, weight in weights.items()
    )


def test_a_complete_run_says_so(run: Command, made: Path) -> None:
    begin = time.process_time()
    outcome = run(*_options(made), "-o", made / "whole", "--resume").well()
    assert "is complete: nothing to resume" in outcome.err
    assert "50.0 %" in outcome.out
    assert time.process_time() - begin < 3
    assert run(*_options(made), "-o", made / "whole", "--resume", "--quiet").well().err == ""


def test_resume_begins_where_there_is_nothing(prune: Command, made: Path, tmp_path: Path) -> None:
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


@pytest.fixture
def interrupted(prune: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run that has done half of stage 1."""
    with monkeypatch.context() as patch:
        probe = zeroth_order.ZerothOrder.projection
        patch.setattr(zeroth_order.ZerothOrder, "projection", _failing(probe, 20, _Crash()))
        assert prune().code == 1
    return tmp_path / "run"


def test_another_option_is_refused(prune: Command, interrupted: Path) -> None:
    journal = (interrupted / "journal" / "importance.jsonl").read_bytes()
    prune("--resume", "--sparsity", "0.6").refused("sparsity: 0.5 then, 0.6 now", "--overwrite")
    line = prune("--resume", "--seed", 1, "--criterion", "magnitude", "--tower-sparsity", "language=0.5").refused(
        "seed: 0 then, 1 now", "criterion: wanda then, magnitude now", "tower_sparsity language: nothing then, 0.5 now"
    )
    assert "granularity" not in line
    assert (interrupted / "journal" / "importance.jsonl").read_bytes() == journal


def test_another_model_data_or_version_is_refused(
    run: Command, made: Path, prune: Command, interrupted: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((interrupted / "recipe.yaml").read_text("utf-8"))
    for name, word in (("torch", "versions torch: 1.0 then"), ("ecoflap", "versions ecoflap: 1.0 then")):
        changed = {**recipe, "versions": {**recipe["versions"], name: "1.0"}}
        (interrupted / "recipe.yaml").write_text(yaml.safe_dump(changed), "utf-8")
        prune("--resume").refused(word)
    (interrupted / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "fingerprint": "0" * 64}), "utf-8")
    prune("--resume").refused("weights", "000000000000…", recipe["fingerprint"][:12])
    (interrupted / "recipe.yaml").write_text("nonsense", "utf-8")
    prune("--resume").refused("recipe.yaml is damaged", "--overwrite")
    (interrupted / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    inputs = interrupted / "journal" / "inputs.json"
    before = inputs.read_text("utf-8")
    inputs.write_text(json.dumps({**json.loads(before), "calibration data": "f" * 64}), "utf-8")
    prune("--resume").refused("calibration data is not the one")
    inputs.write_text(json.dumps({**json.loads(before), "device": "cuda"}), "utf-8")
    prune("--resume").refused("device is not the one", "cuda then, cpu now")
    inputs.write_text(before, "utf-8")
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize(("reason", "code"), [("", 130), ("SIGTERM", 143)])
def test_a_stop_in_process(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, code: int
) -> None:
    with monkeypatch.context() as patch:
        probe = zeroth_order.ZerothOrder.projection
        patch.setattr(zeroth_order.ZerothOrder, "projection", _failing(probe, 5, KeyboardInterrupt(reason)))
        outcome = prune("--quiet")
    assert outcome.code == code
    assert outcome.err == "ecoflap: stopped; the same command with --resume goes on from here\n"
    prune("--resume", "--quiet").well()
    same_result(made / "whole", tmp_path / "run")


def test_a_stop_before_the_run_began(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecoflap.run import prepare

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_checkpoint", _failing(prepare.load_checkpoint, 0, KeyboardInterrupt()))
        outcome = prune()
    assert outcome.code == 130
    assert outcome.err == "ecoflap: stopped; nothing was written\n"
    assert not (tmp_path / "run").exists()


# --- real processes --------------------------------------------------------------------------------------------------


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_and_stopped_again_and_again(tmp_path: Path) -> None:
    from ecoflap.run.pipeline import run_recipe

    model, data = picos.write_checkpoint("llama", tmp_path / "llama"), prose(tmp_path / "prose.txt", 6000)
    job = ecoflap(
        tmp_path, "prune", model, "--calibration", data, "--samples", 90, "--batch-size", 2, "--sequence-length", 60,
        "--importance", "zeroth-order", "--importance-samples", 40, "--criterion", "wanda", "-o", "killed",
        "--resume",
    )  # fmt: skip
    recipe = Recipe(model=str(model), calibration=str(data), samples=90, batch_size=2, sequence_length=60,
                    importance="zeroth-order", importance_samples=40, criterion="wanda")  # fmt: skip
    whole, run = run_recipe(recipe, tmp_path / "whole"), tmp_path / "killed"
    journal, blocks = run / "journal" / "importance.jsonl", run / "journal" / "blocks"
    moments: list[tuple[Callable[[], bool], signal.Signals, int]] = [
        (lambda: _lines(journal) >= 60, signal.SIGKILL, -9),
        (lambda: _lines(journal) >= 150, signal.SIGINT, 130),
        (lambda: _lines(journal) >= 300, signal.SIGTERM, 143),
        (lambda: len(list(blocks.glob("*.safetensors"))) >= 1, signal.SIGKILL, -9),
        (lambda: (run / "model").exists(), signal.SIGKILL, -9),
    ]
    for reached, sent, code in moments:
        with forked(job) as process:
            process.wait_until(reached)
            process.send(sent)
            assert process.wait() == code
            _, err = process.printed()
        if code > 0:
            *chosen, last = [line for line in err.splitlines() if line]
            assert chosen.pop() == "ecoflap: stopping after this step; once more stops at once"
            assert last == "ecoflap: stopped; the same command with --resume goes on from here"
            assert [line.split(":")[0] for line in chosen] == ["calibration", "objective"]
            assert journal.read_bytes().endswith(b"\n")
    run_recipe(recipe, run, resume=True)
    same_result(whole, run)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
