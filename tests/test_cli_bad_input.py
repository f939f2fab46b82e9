"""Every bad input: exit code 2 and one line that says what, where and how to fix it; nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import picos
import pytest
import torch
from console import TEXT, Command, poisoned_llama, prose, questions

from ecoflap.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A language model, a VLM and their data, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    return SimpleNamespace(
        llama=picos.write_checkpoint("llama", folder / "llama"),
        blip2=picos.write_checkpoint("blip2_t5", folder / "blip2"),
        prose=prose(folder / "prose.txt"),
        questions=questions(folder / "vqa"),
    )


@pytest.fixture
def prune(run: Command, made: SimpleNamespace, tmp_path: Path) -> Command:
    """``ecoflap prune`` of the pico LLaMA with more options; afterwards there must be no run directory."""

    def pruned(*arguments: object) -> object:
        outcome = run("prune", made.llama, "--calibration", made.prose, *TEXT, "-o", "run", *arguments)
        assert not (tmp_path / "run").exists()
        return outcome

    return pruned  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.5"], ["--sparsity", "1.5", "less than 1"]),
        (["--sparsity", "-0.1"], ["--sparsity", "-0.1", "0"]),
        (["--sparsity", "nan"], ["--sparsity", "nan"]),
        (["--sparsity", "half"], ["--sparsity", "'half' is not a number"]),
        (["--samples", "2.5"], ["--samples", "'2.5' is not a whole number"]),
        (["--batch-size", "0"], ["--batch-size", "1"]),
        (["--max-sparsity", "0.4"], ["max_sparsity 0.4", "sparsity 0.5", "raise the cap"]),
        (["--min-sparsity", "0.55"], ["0.55", "0.5", "out of reach"]),
        (["--sparsty", "0.5"], ["--sparsty", "--sparsity"]),
        (["--criterion", "wnda"], ["criterion 'wnda'", "did you mean 'wanda'"]),
        (["--importance", "zeroth-oder"], ["importance 'zeroth-oder'", "did you mean 'zeroth-order'"]),
        (["--importance", "."], ["importance '.'", "importance.json"]),
        (["--importance-options", "epsilom=1"], ["epsilom", "epsilon"]),
        (["--importance-options", "epsilon=small"], ["epsilon=small", "a number"]),
        (["--importance-options", "draws=1.5"], ["draws=1.5", "a whole number"]),
        (["--importance-options", "draws=0"], ["draws", "at least 1"]),
        (["--importance-options", "epsilon"], ["'epsilon'", "NAME=VALUE"]),
        (["--importance", "first-order", "--importance-options", "variant=fishr"], ["'fishr'", "'fisher'"]),
        (["--importance-samples", "7"], ["importance_samples 7", "samples 6"]),
        (["--granularity", "blok"], ["--granularity", "blok", "'block'"]),
        (["--aggregate", "median"], ["--aggregate", "median", "'sum'"]),
        (["--task", "vqaa"], ["task 'vqaa'", "did you mean 'vqa'"]),
        (["--task", "perplexity"], ["perplexity", "needs a text"]),
        (["--task", "vqa", "--test", "prose.txt"], ["prose.txt"]),
        (["--pattern", "2x4"], ["pattern", "2x4", "2:4"]),
        (["--pattern", "3:2"], ["3:2", "0 < N < M"]),
        (["--pattern", "2:4", "--sparsity", "0.6"], ["2:4", "fixes the sparsity at 0.5", "leave out"]),
        (["--pattern", "2:4", "--importance", "zeroth-order"], ["2:4", "'zeroth-order'", "uniform"]),
        (["--tower-sparsity", "visoin=0.4"], ["'visoin'", "language"]),
        (["--tower-sparsity", "language"], ["'language'", "TOWER=X"]),
        (["--tower-sparsity", "language=2"], ["language", "from 0 to 1"]),
        (["--include", "nothing.like.this"], ["no layer or tower 'nothing.like.this'", "inspect"]),
        (["--exclude", "*bias"], ["'*bias'", "selects no layer"]),
        (["--exclude", "model.layers"], ["nothing to prune", "excluded"]),
        (["--towers", "model.blocks"], ["model.blocks", "inspect"]),
        (["--objective", "no_such_module:loss"], ["no_such_module:loss", "module:function"]),
        (["--objective", "json:loss"], ["json:loss", "module:function"]),
        (["--objective", "ml"], ["objective 'ml'", "lm"]),
        (["--device", "cudda"], ["cudda", "cpu"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt", "check the path"]),
        (["--columns", "image"], ["'image'", "ROLE=COLUMN"]),
        (["--sequence-length", "5000"], ["5000"]),
        (["--allocation", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["--importance", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["--recipe", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--overwrite", "--resume"], ["--overwrite", "--resume", "one of them"]),
    ],
    ids=lambda value: "_".join(value) if value and value[0].startswith("--") else "",
)
def test_an_option(prune: Command, arguments: list[str], words: list[str]) -> None:
    prune(*arguments).refused(*words)


@pytest.mark.parametrize("option", ["--calibration", "--test", "--image-folder"])
def test_a_path_is_looked_for_before_a_model_is_loaded(
    prune: Command, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("ecoflap.run.loading.load", lambda *_, **__: pytest.fail("it was loaded"))
    prune(option, "nowhere.txt").refused("nowhere.txt")


def test_numbers_without_end(prune: Command) -> None:
    for option in ("--batch-size", "--test-batch-size", "--seed"):
        prune(option, "9" * 30).refused(option, "less than")
    prune("--recover", "--recover-options", "steps=" + "9" * 30).refused("steps", "100,000")
    prune("--recover", "--recover-options", "damping=.inf").refused("damping")
    prune("--sparsity", "inf").refused("--sparsity")


def test_a_pattern_that_does_not_divide(prune: Command) -> None:
    prune("--pattern", "2:5").refused("2:5", "columns", "q_proj")


def test_no_such_command(run: Command) -> None:
    run("prun").refused("'prun'", "'prune'")


def test_empty_calibration(prune: Command, tmp_path: Path) -> None:
    for name in ("empty.txt", "empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
        prune("--calibration", name).refused(name, "empty")
    (tmp_path / "short.txt").write_text("what color is it", "utf-8")
    prune("--calibration", "short.txt").refused("short.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": \n', "utf-8")
    prune("--calibration", "bad.jsonl").refused("bad.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    prune("--calibration", "bad.parquet").refused("bad.parquet")


@pytest.mark.parametrize("name", ["prune", "importance"])
def test_a_model_that_needs_calibration(run: Command, made: SimpleNamespace, tmp_path: Path, name: str) -> None:
    run(name, made.llama, "-o", "new").refused("needs calibration data", "--calibration FILE")
    assert not (tmp_path / "new").exists()


def test_text_for_a_model_that_needs_images(run: Command, made: SimpleNamespace) -> None:
    run("prune", made.blip2, "--calibration", made.prose, *TEXT).refused("prose.txt", "images")


def test_test_data_that_does_not_fit(prune: Command, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"caption": "a red star"}\n', "utf-8")
    prune("--task", "vqa", "--test", "captions.jsonl").refused("captions.jsonl", "questions")
    prune("--test", "nowhere.txt").refused("nowhere.txt")


def test_an_unreadable_checkpoint(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    def refused(folder: Path, *words: str) -> None:
        run("prune", folder, "--calibration", made.prose, *TEXT, "-o", "run").refused(*words)
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "nowhere", "nowhere")
    cut = shutil.copytree(made.llama, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(cut, "model.safetensors", "broken")
    pickled = shutil.copytree(made.llama, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    refused(pickled, "pickled", "safetensors")
    (cut / "config.json").write_text("{", "utf-8")
    refused(cut, "config.json")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "config.json")
    refused(made.prose, "prose.txt")


def test_a_loss_that_is_not_finite(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    word = "square"

    poisoned = poisoned_llama(tmp_path / "poisoned", word)
    (tmp_path / "all.txt").write_text(f"{word} " * 200, "utf-8")
    run("prune", poisoned, "--calibration", "all.txt", *TEXT, "-o", "run").refused("calibration batch 0", "nan")
    assert not (tmp_path / "run").exists()
    # The word stands at the end of the text alone: the line must name the batch that has it, not the first.
    clean = [other for other in picos.WORDS if other != word]
    (tmp_path / "end.txt").write_text(" ".join((clean * 9)[:140]) + f" {word}" * 4, "utf-8")
    few = ("--samples", 11, "--batch-size", 1, "--sequence-length", 12, "--importance-samples", 11, "--seed", 2)
    line = run("prune", poisoned, "--calibration", "end.txt", *few, "-o", "run").refused("calibration batch", "nan")
    assert "batch 0 " not in line


def test_recipes(prune: Command, tmp_path: Path) -> None:
    def recipe(text: str) -> str:
        (tmp_path / "r.yaml").write_text(text, "utf-8")
        return "r.yaml"

    prune("--recipe", recipe("sparsity: [0.5\n")).refused("r.yaml")
    prune("--recipe", recipe("- a\n- b\n")).refused("r.yaml", "field: value")
    prune("--recipe", recipe("")).refused("r.yaml", "field: value")
    prune("--recipe", recipe("sparsty: 0.5\n")).refused("r.yaml", "'sparsty'", "did you mean 'sparsity'")
    prune("--recipe", recipe("sparsity: much\n")).refused("r.yaml: sparsity", "'much' is not a number")
    prune("--recipe", recipe("criterion: wandb\n")).refused("r.yaml", "'wandb'", "'wanda'")
    prune("--recipe", recipe("tower_sparsity: 0.5\n")).refused("r.yaml: tower_sparsity")
    prune("--recipe", recipe("sparsity: !!python/object/apply:os.system [ls]\n")).refused("r.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    prune("--recipe", "r.yaml").refused("r.yaml")


def test_importance_edited_badly(run: Command, prune: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    run("importance", made.llama, "--calibration", made.prose, *TEXT, "-o", "good.json").well()
    good = json.loads((tmp_path / "good.json").read_text("utf-8"))
    name = good["layers"][3]["name"]

    def refused(change: object, *words: str) -> None:
        edited = json.loads(json.dumps(good))
        change(edited)  # type: ignore[operator]
        (tmp_path / "edited.json").write_text(json.dumps(edited), "utf-8")
        run("allocate", "edited.json").refused("edited.json", *words)
        assert not (tmp_path / "allocation.json").exists()
        prune("--importance", "edited.json").refused("edited.json", *words)

    refused(lambda data: data["layers"][3].pop("score"), "layer 3")
    refused(lambda data: data["layers"][3].update(score="high"), "layer 3")
    refused(lambda data: data["layers"][3].update(score=-1.0), name, "-1.0")
    refused(lambda data: data["layers"][3].update(score=float("nan")), "NaN")
    refused(lambda data: data["layers"][3].update(shape=[4]), "layer 3")
    refused(lambda data: data["layers"].append(data["layers"][3]), name, "twice")
    refused(lambda data: data.update(layers=None), "layers")
    (tmp_path / "edited.json").write_text(json.dumps(good)[:-20], "utf-8")
    run("allocate", "edited.json").refused("edited.json")
    good["layers"].pop()
    (tmp_path / "edited.json").write_text(json.dumps(good), "utf-8")
    prune("--importance", "edited.json").refused("importance is of another model", "no entry")


def test_allocation_of_another_model_or_edited_badly(
    run: Command, prune: Command, made: SimpleNamespace, tmp_path: Path
) -> None:
    run("importance", made.blip2, "--calibration", made.questions, "--samples", 4, "--importance-samples", 2,
        "--importance", "first-order", "-o", "blip2.json").well()  # fmt: skip
    run("allocate", "blip2.json").well()
    prune("--allocation", "allocation.json").refused("allocation is of another model", "model.layers.0", "no entry")
    data = json.loads((tmp_path / "allocation.json").read_text("utf-8"))
    data["layers"][0]["zeros"] = -4
    (tmp_path / "allocation.json").write_text(json.dumps(data), "utf-8")
    prune("--allocation", "allocation.json").refused("allocation.json", data["layers"][0]["name"], "-4")
    (tmp_path / "allocation.json").write_text("[]", "utf-8")
    prune("--allocation", "allocation.json").refused("allocation.json", "format")
    run("allocate", "allocation.json", "-o", "x.json").refused("allocation.json", "layers")


def test_an_unstructured_allocation_with_a_pattern(run: Command, prune: Command, made: SimpleNamespace) -> None:
    run("importance", made.llama, "--calibration", made.prose, *TEXT, "-o", "i.json").well()
    run("allocate", "i.json", "-o", "a.json").well()
    prune("--allocation", "a.json", "--pattern", "2:4").refused("2:4", "zeros", "model.layers.0")
    prune("--allocation", "a.json", "--sparsity", "0.6").refused("a.json", "0.5", "0.6", "leave out")


def test_output_that_exists(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    job = ("prune", made.llama, "--calibration", made.prose, *TEXT)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work", "utf-8")
    for flags in ([], ["--overwrite"], ["--resume"]):
        run(*job, *flags, "-o", "foreign").refused("foreign", "no run of ecoflap", "another --output")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("", "utf-8")
    run(*job, "-o", "file").refused("file is a file", "another --output")
    for name in ("importance", "evaluate"):
        run(name, made.llama, "--calibration" if name == "importance" else "--test", made.prose, "-o", "file").refused(
            "file is there already", "--overwrite"
        )
    run("importance", made.llama, "--calibration", made.prose, "-o", "foreign").refused("foreign is a folder")
    run("report", "foreign").refused("foreign")
    run("report", "nowhere").refused("nowhere")
    run("allocate", "nowhere.json").refused("nowhere.json")


def test_evaluate_without_a_task_and_inspect_of_nothing(run: Command, made: SimpleNamespace) -> None:
    run("evaluate", made.llama).refused("--task", "--test")
    run("evaluate", made.blip2, "--task", "perplexity", "--test", made.prose).refused("perplexity", "Blip2")
    run("inspect", "nowhere/at/all").refused("nowhere/at/all")
    run("inspect", made.llama, "--calibration", "nowhere.txt").refused("nowhere.txt")


def test_what_nobody_foresaw_is_one_line_unless_asked_for(
    run: Command, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecoflap.run import commands

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("the moon is full")

    monkeypatch.setattr(commands, "evaluate_model", breaks)
    outcome = run("evaluate", made.llama, "--task", "perplexity", "--test", made.prose)
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert "ZeroDivisionError: the moon is full" in outcome.err
    assert "ECOFLAP_TRACEBACK=1" in outcome.err
    monkeypatch.setenv("ECOFLAP_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_model_that_fails_in_a_test_is_one_line_and_its_traceback_can_be_seen(
    run: Command, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise TypeError("new(): invalid data type 'str'")

    monkeypatch.setattr("ecoflap.evaluation.perplexity.Perplexity.run", breaks)
    asked = ("evaluate", made.llama, "--task", "perplexity", "--test", made.prose)
    run(*asked).refused("task 'perplexity' can't work on LlamaForCausalLM", "invalid data type", "ECOFLAP_TRACEBACK=1")
    monkeypatch.setenv("ECOFLAP_TRACEBACK", "1")
    shown = run(*asked)
    assert shown.code == 2
    assert "in breaks" in shown.err
