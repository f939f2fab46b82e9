"""``ecoflap finetune`` on the command line: a run's own dense model and tests, and one line for every mistake."""

from __future__ import annotations

import json

import pytest
from console import TEXT, llama_and_prose, prose
from tuning import recipe_of

from ecoflap.run.finetune.pipeline import run_finetune


def test_a_run_and_what_it_says(run, tmp_path):
    """Dense model, tests and sequence length are those of the run; the packed form and the page take its folder."""
    llama_and_prose(tmp_path)
    prose(tmp_path / "train.txt", 600, seed=2)
    run(
        "prune", "llama", "--calibration", "prose.txt", *TEXT, "--test", "prose.txt", "--test-samples", 3,
        "--criterion", "magnitude", "--importance", "uniform", "-o", "run",
    ).well()  # fmt: skip
    again = ["finetune", "run", "--train", "train.txt", "--epochs", 1, "--learning-rate", 3e-3, "-o", "tuned"]
    found = run(*again, "--json").well()
    told = json.loads(found.out)
    assert told["finetuned"]["perplexity"]["n"] == told["dense"]["perplexity"]["n"]
    assert "Traceback" not in found.err
    assert "shards" not in found.err
    assert told["compute_dtype"] == "native"  # of the evaluations; the model is fp32
    run(*again, "-o", "other", "--dense", "no/model").refused("no/model")  # asked for, and not only the run's
    run(*again).refused("already holds a fine-tuning", "--overwrite")
    assert "complete: nothing to resume" in run(*again, "--resume").well().err
    shown = run(*again, "--overwrite").well()
    assert "fine-tuned" in shown.out
    assert "training: " in shown.err
    run("prune", "llama", "--calibration", "prose.txt", *TEXT, "-o", "tuned", "--overwrite").refused("no run")
    run("pack", "tuned", "--output", "packed").well()
    assert "report" in run("report", "tuned").well().out
    second = run("finetune", "tuned", "--train", "train.txt", "--epochs", 0.3, "-o", "twice", "--json").well()
    assert json.loads(second.out)["dense"]["perplexity"] == told["dense"]["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["what to train?"]),
        (["{llama}"], ["training data", "--train"]),
        (["{dense}", "--train", "{prose}"], ["no matrix", "prune it first"]),
        (["{llama}", "--train", "nowhere.txt"], ["nowhere.txt", "check the path"]),
        (["{llama}", "--train", "{prose}", "--dense", "no/model"], ["the hub", "no/model"]),
        (["{llama}", "--train", "{prose}", "--epochs", "0"], ["--epochs", "greater than 0"]),
        (["{llama}", "--train", "{prose}", "--held-out", "1"], ["--held-out", "less than 1"]),
        (["{llama}", "--train", "{prose}", "--held-out", "0.2", "--validation", "{prose}"], ["both given"]),
        (["{llama}", "--train", "{prose}", "--dtype", "float16"], ["float16", "bfloat16"]),
        (["{llama}", "--train", "{prose}", "--tune", "some"], ["--tune", "some"]),
        (["{llama}", "--train", "{prose}", "--distill", "1"], ["--dense"]),
        (["{llama}", "--train", "{prose}", "--sequence-length", "1100"], ["64 positions"]),
        (["{llama}", "--train", "{prose}", "--training-options", "seed=1"], ["seed", "--seed"]),
        (["{llama}", "--train", "{prose}", "--training-options", "fsdp=true"], ["finetune sets it itself"]),
        (["{llama}", "--train", "{prose}", "--training-options", "lr_schedule_type=cosine"], ["lr_scheduler_type"]),
        (["{llama}", "--train", "{prose}", "--training-options", "lr_scheduler_type=round"], ["refuses", "round"]),
        (["{llama}", "--train", "{prose}", "--test", "gone.txt"], ["gone.txt"]),
        (["{blip2}", "--train", "{prose}"], ["plain text", "images"]),
        (["{blip2}", "--train", "{questions}", "--columns", "image=nothing"], ["nothing"]),
        (["--sparsity", "0.5"], ["--sparsity"]),
    ],
)
def test_mistakes(arguments, words, made, run, tmp_path):
    places = {name: str(getattr(made, name)) for name in ("llama", "dense", "prose", "questions", "blip2")}
    short = [] if "--sequence-length" in arguments or "{blip2}" in arguments else ["--sequence-length", "12"]
    run("finetune", *(text.format(**places) for text in arguments), *short, "-o", "out").refused(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "inf"], ["--epochs", "finite"]),
        (["--seed", "9" * 30], ["--seed", "4294967296"]),
        (["--tune", "lora", "--rank", "9" * 30], ["--rank"]),
        (["--training-options", "dataloader_drop_last=true"], ["dataloader_drop_last"]),
        (["--training-options", "adam_beta1=5"], ["adam_beta1", "Invalid beta parameter"]),
        (["--learning-rate", "1e30"], ["held-out loss is nan", "--learning-rate"]),
    ],
)
def test_values_that_can_not_be_trained_with(arguments, words, made, run):
    found = run("finetune", made.llama, "--train", made.prose, "--train-samples", 6, "--batch-size", 2,
                "--sequence-length", 12, "--epochs", 1, *arguments, "-o", "out", "--quiet")  # fmt: skip
    found.refused(*words)


def test_a_run_is_not_trusted_with_code(made, run, tmp_path):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text("model: x\nobjective: 'os:system'\n")
    run("finetune", "run", "--train", made.prose, "-o", "out").refused("run code", "--objective os:system")


def test_a_run_without_its_model(made, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: x\n")
    run("finetune", "run", "--train", made.prose).refused("no model yet", "--resume")


def test_a_dense_model_that_is_gone(made, tmp_path, pageless, caplog):
    """Of a run, it is left out with a warning; where it is asked for, it is missed at once."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: gone/away\n")
    (folder / "model").symlink_to(made.llama)
    out = run_finetune(recipe_of(folder, made.prose, **made.text, epochs=0.3), tmp_path / "out")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["dense"] == {}
    assert metrics["pruned"]
    assert "no results of the dense model" in caplog.text
