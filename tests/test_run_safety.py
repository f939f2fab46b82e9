"""What a run is never to do: trust a damaged or edited file, mix two states, or say nothing about what went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import picos
import pytest
import torch
from console import TEXT, Command, poisoned_llama, prose, same_result

from ecoflap.cli.signals import Stops
from ecoflap.errors import ResumeMismatch
from ecoflap.importance import zeroth_order
from ecoflap.importance.scores import Estimate
from ecoflap.pruning import walk
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.run.journal import BlockFiles, EstimateFile, SearchFile
from ecoflap.run.manifest import Results
from ecoflap.run.provenance import Usage, add_usage
from ecoflap.support import files
from ecoflap.support.files import read_sealed, write_sealed

PROBE = zeroth_order.ZerothOrder.projection


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data, and ``whole``: an undisturbed run."""
    from ecoflap.run.pipeline import run_recipe
    from ecoflap.run.recipe import Recipe

    folder = tmp_path_factory.mktemp("safe")
    picos.write_checkpoint("llama", folder / "llama")
    text = str(prose(folder / "prose.txt"))
    recipe = Recipe(model=str(folder / "llama"), calibration=text, samples=6, batch_size=2, sequence_length=12,
                    importance="zeroth-order", importance_samples=4, criterion="wanda", test=text,
                    test_samples=3)  # fmt: skip
    run_recipe(recipe, folder / "whole")
    return folder


@pytest.fixture
def prune(run: Command, made: Path) -> Command:
    data = made / "prose.txt"
    job = ["prune", made / "llama", "--calibration", data, *TEXT, "--importance", "zeroth-order", "--criterion",
           "wanda", "--test", data, "--test-samples", 3, "-o", "run"]  # fmt: skip
    return lambda *more: run(*job, *more)


def _at(number: int, then: Callable[[], object]) -> Callable[..., float]:
    """The zeroth order's probe, which calls ``then`` in its probe ``number`` (from 0), before it computes."""
    calls = iter(range(10**9))

    def probe(*arguments: object) -> float:
        if next(calls) == number:
            then()
        return PROBE(*arguments)  # type: ignore[arg-type]

    return probe


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _crash() -> None:
    raise ValueError("a data worker was killed")


def _runs_out_of_memory() -> None:
    torch.empty(2**60)


def test_out_of_memory_says_what_takes_less(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeroth_order.ZerothOrder, "projection", _at(3, _runs_out_of_memory))
    found = prune()
    assert found.code == 2
    line = found.err.splitlines()[-1]
    assert "out of memory" in line
    assert "--batch-size" in line
    assert "--resume" in line
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_probe(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(6, _signal(sent)))
        outcome = prune()
    assert outcome.code == code
    *_, told, last = [line for line in outcome.err.splitlines() if line]
    assert told == "ecoflap: stopping after this step; once more stops at once"
    assert last == "ecoflap: stopped; the same command with --resume goes on from here"
    assert (tmp_path / "run" / "journal" / "importance.jsonl").read_bytes().count(b"\n") == 7
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


def test_a_second_signal_stops_at_once(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        _signal(signal.SIGTERM)()
        _signal(signal.SIGINT)()

    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(6, twice))
        outcome = prune("--quiet")
    assert (outcome.code, outcome.err) == (143, "ecoflap: stopped; the same command with --resume goes on from here\n")
    assert (tmp_path / "run" / "journal" / "importance.jsonl").read_bytes().count(b"\n") == 6


WITHIN_A_CALL = """
import hashlib, threading
from ecoflap.cli.signals import stops
from ecoflap.support.progress import Silent
with stops.listening(), stops.progress(Silent()).stage("pruning", total=2):
    threading.Timer(0.2, print, ["at work"], {"flush": True}).start()  # when the call below has begun
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes, in which Python calls no handler
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_a_call_that_python_waits_for(sent: signal.Signals, code: int) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WITHIN_A_CALL], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "at work\n"
            process.send_signal(sent)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline() == "ecoflap: stopping after this step; once more stops at once\n"
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == code
            assert process.stderr.read().startswith("ecoflap: stopped at once;")
        finally:
            process.kill()


def test_a_stage_that_is_over_is_written_first(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(41, _signal(signal.SIGINT)))  # the last probe
        assert prune("--quiet").code == 130
    assert (tmp_path / "run" / "allocation.json").exists()
    assert not (tmp_path / "run" / "model").exists()
    prune("--resume").well()
    same_result(made / "whole", tmp_path / "run")


def test_signals_outside_of_stages_and_ignored_ones() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stops = Stops()
        with stops.listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # nohup, or a shell's background job
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)  # nothing is under way
    finally:
        signal.signal(signal.SIGINT, before)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_line_that_was_altered_ends_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = EstimateFile(path)
    rows = [Estimate(f"layer.{number}", number, 0, number / 7) for number in range(9)]
    for row in rows:
        journal.append(row)
    journal.close()
    content = path.read_bytes()
    line = content.splitlines(keepends=True)[4]
    for altered in (line.replace(b'"0x1.', b'"0x1.f'), line.replace(b"layer.4", b"layer.5"), b"\0" * len(line)):
        path.write_bytes(content.replace(line, altered))
        assert list(EstimateFile(path).estimates()) == rows[:4]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:4])
    path.write_bytes(content + b"\0" * 512)  # as a power cut leaves it
    assert list(EstimateFile(path).estimates()) == rows


def test_damaged_journals_are_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocks, search = BlockFiles(tmp_path), SearchFile(tmp_path / "search.json")
    blocks.save("b", PrunedBlock({"w": torch.arange(12.0).view(3, 4)}))
    search.save({"zeros": {"w": 3}, "loss": 0.5})
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert search.load() == {"zeros": {"w": 3}, "loss": 0.5}
    for change in (lambda b: b[:-5], lambda b: b[:-5] + b"\1" + b[-4:], lambda b: b"\0" * len(b), lambda b: b""):
        for path, content in whole.items():
            path.write_bytes(change(content))
        caplog.clear()
        assert blocks.load("b") is None
        assert search.load() is None
        assert caplog.text.count("is damaged") == 2
    relabelled = whole[tmp_path / "b.safetensors"].replace(b'"unreached":"[]"', b'"unreached":"9 "')
    (tmp_path / "b.safetensors").write_bytes(relabelled)
    assert relabelled != whole[tmp_path / "b.safetensors"]
    assert blocks.load("b") is None  # the metadata counts, too
    (tmp_path / "search.json").write_text(whole[tmp_path / "search.json"].decode().replace("0.5", "0.25"), "utf-8")
    assert search.load() is None
    for path, content in whole.items():
        path.write_bytes(content)
    assert blocks.load("b") is not None


def test_the_times_of_one_stage_add_up() -> None:
    usages: list[Usage] = []
    for usage in (Usage("a", 1.5, 7, None), Usage("b", 1.0, 3, 5), Usage("a", 2.0, 6, 4), Usage("a", 0.5, 9, 3)):
        add_usage(usages, usage)
    assert usages == [Usage("a", 4.0, 9, 4), Usage("b", 1.0, 3, 5)]


def test_a_sealed_file_of_another_kind_is_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.json"
    write_sealed(path, [{"name": "saving"}])
    assert read_sealed(path, list[dict[str, str]]) == [{"name": "saving"}]
    assert read_sealed(path, dict[str, str]) is None
    assert "is damaged" in caplog.text


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("name", ["importance.json", "journal/dense.json", "journal/stages.json", "allocation.json"])
def test_a_file_of_zeros_is_made_again(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(walk._Walker, "prune_layers", lambda *_: _crash())
        assert prune().code == 1
    path = tmp_path / "run" / name
    path.write_bytes(b"\0" * path.stat().st_size)
    assert f"{name} is damaged" in prune("--resume").well().err
    same_result(made / "whole", tmp_path / "run")


def test_a_file_edited_by_hand_is_refused(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(walk._Walker, "prune_layers", lambda *_: _crash())
        outcome = prune()
    assert outcome.code == 1
    assert "data worker" in outcome.err
    path = tmp_path / "run" / "allocation.json"
    before = path.read_text("utf-8")
    data = json.loads(before)
    data["layers"][0]["zeros"] += 1
    path.write_text(json.dumps(data), "utf-8")
    prune("--resume").refused("allocation.json was changed after the run wrote it", "remove it", "--allocation FILE")
    path.write_text(before, "utf-8")
    prune("--resume").well()


def test_results_of_which_nothing_was_noted_are_taken(tmp_path: Path) -> None:
    results = Results(tmp_path, tmp_path / "written.json")
    assert not results.has("importance.json")
    results.write("importance.json", {"a": 1})
    results.write("importance.json", {"a": 2})
    assert results.has("importance.json")
    files.write_json(tmp_path / "importance.json", {"a": 1})  # a kill between noting and writing leaves the older one
    assert results.has("importance.json")
    files.write_json(tmp_path / "importance.json", {"a": 3})
    with pytest.raises(ResumeMismatch, match="changed after the run wrote it"):
        results.has("importance.json")
    (tmp_path / "written.json").unlink()
    assert results.has("importance.json")


# --- what else decides the result ------------------------------------------------------------------------------------


def test_other_test_data_is_refused(run: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, test = made / "prose.txt", prose(tmp_path / "test.txt")
    job = ("prune", made / "llama", "--calibration", text, *TEXT, "--importance", "zeroth-order",
           "--criterion", "wanda", "--test", test, "--test-samples", 3, "-o", "run")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(3, _crash))
        assert run(*job).code == 1
    prose(test, seed=9)
    run(*job, "--resume").refused("the test data of perplexity is not the one that the run began with")


def test_as_many_threads_as_at_the_beginning(
    prune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(3, _crash))
        assert prune().code == 1
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(zeroth_order.ZerothOrder, "projection", _at(0, lambda: seen.append(torch.get_num_threads())))
            prune("--resume").well()
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert "1 threads, as when the run began, not 2" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    same_result(made / "whole", tmp_path / "run")


def test_another_machine_is_told(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(3, _crash))
        assert prune().code == 1
    path = tmp_path / "run" / "journal" / "machine.json"
    files.write_sealed(path, {**files.read_sealed(path), "instructions": "ABACUS"})  # type: ignore[dict-item]
    assert "another machine (instructions ABACUS then" in prune("--resume").well().err


# --- samples that give NaN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [("--importance", "uniform"), ()])
def test_a_sample_that_gives_nan_is_named(run: Command, tmp_path: Path, stage: tuple[str, ...]) -> None:
    model = poisoned_llama(tmp_path / "model", "circle")
    rows = [{"question": "what color ?", "answer": "circle" if number == 7 else "red"} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    told: list[str] = []
    for seed in range(2):
        job = ("--calibration", "rows.jsonl", "--samples", 10, "--batch-size", 2, "--seed", seed)
        outcome = run("prune", model, *job, *stage, "-o", f"run{seed}", "--importance-samples", 10)
        assert outcome.code == 2
        told.append(outcome.err.splitlines()[-1])
    assert any("rows " in line for line in told)  # the first batch is looked at before the run begins
    for line in told:
        assert "nan" in line.lower() or "finite" in line
        if "rows " in line:
            assert "7" in line.partition("rows ")[2].partition(" of rows.jsonl")[0].split(", ")


# --- stage 1 alone ---------------------------------------------------------------------------------------------------


def test_importance_goes_on(run: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ("importance", made / "llama", "--calibration", made / "prose.txt", *TEXT, "--importance", "zeroth-order")
    run(*job, "-o", "whole.json").well()
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", _at(20, _signal(signal.SIGINT)))
        outcome = run(*job)
    assert outcome.code == 130
    assert "--resume goes on from here" in outcome.err
    assert not (tmp_path / "importance.json").exists()
    run(*job).refused("importance.json.journal", "--resume", "--overwrite")
    run(*job, "--resume", "--seed", 4).refused("seed: 0 then, 4 now")
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", lambda *a: (counted.append(1), PROBE(*a))[1])
        run(*job, "--resume").well()
    assert len(counted) == 42 - 21
    assert (tmp_path / "importance.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["importance.json", "whole.json"]
    run(*job, "--resume").refused("importance.json is there already")
