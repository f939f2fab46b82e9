"""A fine-tuning from its data to the saved model: zeros to the bit, better on held-out data, resumable, one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from console import model_weights
from transformers import AutoModelForCausalLM
from tuning import recipe_of, same_zeros, sparse_checkpoint

from ecoflap.errors import EcoflapError
from ecoflap.report import rebuild
from ecoflap.run.directory import Stopped
from ecoflap.run.finetune.pipeline import run_finetune
from ecoflap.support.progress import Silent


def losses(folder: Path) -> dict[int, float]:
    return dict(json.loads((folder / "metrics.json").read_text())["training"]["held_out"])


def test_model_metrics_and_page(trained, made):
    same_zeros(made.llama, trained / "model")
    metrics = json.loads((trained / "metrics.json").read_text())
    held_out, training = losses(trained), metrics["training"]
    assert held_out[training["best"]] == min(held_out.values()) < held_out[0]
    assert training["samples"] + training["held_out_samples"] == 66
    for model in ("dense", "pruned", "finetuned"):
        assert metrics[model]["perplexity"]["value"] > 1
    assert metrics["finetuned"]["perplexity"]["value"] < metrics["pruned"]["perplexity"]["value"]
    assert set(metrics["paired"]["perplexity"]) == {"dense", "pruned"}
    zeros = sum(int((w == 0).sum()) for n, w in model_weights(made.llama).items() if "layers" in n and w.dim() == 2)
    assert metrics["sparsity"]["prunable"] * metrics["sparsity"]["prunable_parameters"] == pytest.approx(zeros)
    names = {"log.txt", "manifest.json", "metrics.json", "model", "recipe.yaml", "report.html"}
    assert {path.name for path in trained.iterdir()} == names
    assert (trained / "model" / "tokenizer.json").exists()
    AutoModelForCausalLM.from_pretrained(trained / "model")
    card = (trained / "model" / "README.md").read_text()
    value = metrics["finetuned"]["perplexity"]["value"]
    assert f"{value:.4g}" in card
    assert f"value: {value}" in card  # in the head, as the Hub lists it
    for words in ("| fine-tuned |", "the others are fine-tuned", "59 samples of prose.txt", "ecoflap finetune"):
        assert words in card
    pair = metrics["paired"]["perplexity"]["dense"]
    assert (
        f"; {pair['better']} better, {pair['worse']} worse, p " in card.partition("minus dense on the same samples")[2]
    )
    assert str(made.prose.parent) not in card


def test_the_page_is_built_again_from_the_files(trained):
    page = (trained / "report.html").read_text()
    for words in ("Fine-tuned", "Loss by step", "ecoflap finetune", "--distill 0.5", "zeros kept"):
        assert words in page
    assert rebuild(trained).read_text() == page


def test_the_saved_weights_are_those_of_the_best_look(trained, made):
    """The held-out loss of the saved model is the lowest one that the record has."""
    from ecoflap.data.objectives import on_device, resolve
    from ecoflap.model.checkpoint import load
    from ecoflap.run.finetune.data import collate, training_data
    from ecoflap.run.finetune.recipe import Finetune

    recipe = Finetune.load(trained / "recipe.yaml")
    checkpoint = load(trained / "model")
    data = training_data(recipe, checkpoint)
    loss = on_device(resolve(None, checkpoint.model))
    rows = [data.held_out[index] for index in range(len(data.held_out))]
    with torch.no_grad():
        values = [float(loss(checkpoint.model, collate([row]))) for row in rows]
    assert sum(values) / len(values) == pytest.approx(min(losses(trained).values()), rel=1e-4)


class StopAt:
    """Progress that is told to stop after so many steps of the training."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def stage(self, name, total, done=0):
        silent = Silent().stage(name, total, done)
        return self if name == "fine-tuning" else silent

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def advance(self, steps=1, detail=""):
        self._left -= steps
        if self._left <= 0:
            raise KeyboardInterrupt("SIGTERM")


def test_stopped_and_resumed_it_ends_with_the_same_bits(made, tmp_path, pageless):
    recipe = recipe_of(made.llama, made.prose, **made.text, accumulate=2, patience=0)
    whole = run_finetune(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_finetune(recipe, tmp_path / "halves", progress=StopAt(7))
    assert (tmp_path / "halves" / "journal" / "checkpoints" / "checkpoint-7").is_dir()
    assert not (tmp_path / "halves" / "model").exists()
    with pytest.raises(EcoflapError, match="already holds a fine-tuning"):
        run_finetune(recipe, tmp_path / "halves")
    with pytest.raises(EcoflapError, match=r"epochs: 2\.0 then, 3\.0 now"):
        run_finetune(recipe.model_copy(update={"epochs": 3.0}), tmp_path / "halves", resume=True)
    shutil.copytree(tmp_path / "halves", tmp_path / "damaged")
    torn = tmp_path / "halves" / "journal" / "checkpoints" / "checkpoint-9"
    torn.mkdir()  # of a process that was killed while it wrote
    (torn / "model.safetensors").write_bytes(b"half")
    halves = run_finetune(recipe, tmp_path / "halves", resume=True)
    one, other = model_weights(whole / "model"), model_weights(halves / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(whole) == losses(halves)
    run_finetune(recipe, tmp_path / "halves", overwrite=True, progress=Silent())  # nothing of it is a stranger's
    state = tmp_path / "damaged" / "journal" / "checkpoints" / "checkpoint-7" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    again = run_finetune(recipe, tmp_path / "damaged", resume=True)
    assert "checkpoint-7 is damaged: the training begins again" in (again / "log.txt").read_text("utf-8")
    assert all(torch.equal(weight, one[name]) for name, weight in model_weights(again / "model").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_keeps_its_dtype(dtype, made, tmp_path, pageless):
    """Trained in float32, where steps of 1e-3 add up, and saved as it came."""
    source = sparse_checkpoint("llama", tmp_path / "half", dtype)
    folder = run_finetune(recipe_of(source, made.prose, sequence_length=12), tmp_path / "out")
    same_zeros(source, folder / "model")


def test_bfloat16_weights_are_trained_as_they_are(made, tmp_path, pageless):
    source = sparse_checkpoint("llama", tmp_path / "half", torch.bfloat16)
    recipe = recipe_of(source, made.prose, sequence_length=12, dtype="bfloat16", learning_rate=1e-2)
    same_zeros(source, run_finetune(recipe, tmp_path / "out") / "model")


def test_questions_about_pictures(made, tmp_path, pageless):
    recipe = recipe_of(made.blip2, made.questions, task=["vqa"], test=str(made.questions), distill=0.0, epochs=1)
    folder = run_finetune(recipe, tmp_path / "out")
    same_zeros(made.blip2, folder / "model")
    assert json.loads((folder / "metrics.json").read_text())["finetuned"]["vqa"]["n"] == 24


def test_where_nothing_helps_the_weights_stay(made, tmp_path, pageless):
    """A rate that only does harm: training stops early, and the pruned model is what is saved."""
    recipe = recipe_of(made.llama, made.prose, sequence_length=12, learning_rate=50.0, patience=1, evaluate_every=1)
    folder = run_finetune(recipe, tmp_path / "out")
    training = json.loads((folder / "metrics.json").read_text())["training"]
    assert training["best"] == 0
    assert training["steps"] < training["planned"]
    before, after = model_weights(made.llama), model_weights(folder / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "no evaluation had a lower held-out loss" in (folder / "log.txt").read_text()


def test_held_out_data_of_its_own(made, tmp_path, pageless):
    recipe = recipe_of(made.llama, made.prose, sequence_length=12, validation=str(made.held_out), epochs=0.5)
    training = json.loads((run_finetune(recipe, tmp_path / "out") / "metrics.json").read_text())["training"]
    assert (training["samples"], training["held_out_samples"]) == (66, 16)


def test_pictures_are_decoded_when_a_batch_needs_them(made, tmp_path, monkeypatch):
    """Of 200 questions a few pictures are looked at first; one that is broken later is left out of its batch."""
    from ecoflap.data import rows as data_rows
    from ecoflap.model.checkpoint import load
    from ecoflap.run.finetune.data import PROBED, collate, training_data

    lines = made.questions.read_text().splitlines()
    records = [{**json.loads(line), "image": str(made.questions.parent / f"{i % 24}.png")}
               for i, line in enumerate(lines * 9)][:200]  # fmt: skip
    (tmp_path / "broken.png").write_bytes(b"no picture")
    records[150]["image"] = "broken.png"
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    decoded = []
    whole = data_rows.decode
    monkeypatch.setattr(data_rows, "decode", lambda value, finder: decoded.append(value) or whole(value, finder))
    data = training_data(recipe_of(made.blip2, path), load(made.blip2))
    assert len(decoded) == PROBED
    assert (len(data.train), len(data.held_out)) == (180, 20)
    numbers = [data.train[i][0][0] for i in range(len(data.train))]
    assert sorted(numbers + [data.held_out[i][0][0] for i in range(20)]) == list(range(200))
    home = data.train if 150 in numbers else data.held_out
    chosen = [home[i] for i in range(len(home)) if home[i][0][0] in (150, 151, 152)]
    with pytest.warns(UserWarning, match="sample 150 is left out"):
        batch = collate(chosen)
    assert len(batch["labels"]) == len(chosen) - 1
    assert len(decoded) == PROBED + len(chosen)


def test_more_broken_pictures_than_a_few_are_refused_at_once(made, tmp_path):
    lines = [json.loads(line) | {"image": "gone.png"} for line in made.questions.read_text().splitlines()[:4]]
    path = tmp_path / "broken.jsonl"
    whole = made.questions.read_text().replace('"image": "', f'"image": "{made.questions.parent}/')
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + whole)
    with pytest.raises(EcoflapError, match=r"4 of the first 28 samples are broken \(row 0: no image file"):
        run_finetune(recipe_of(made.blip2, path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_more_is_held_out_than_is_needed(made, monkeypatch):
    from ecoflap.model.checkpoint import load
    from ecoflap.run.finetune.data import training_data

    monkeypatch.setattr("ecoflap.run.finetune.data.MOST", 3)
    checkpoint = load(made.llama)
    data = training_data(recipe_of(made.llama, made.prose, sequence_length=12), checkpoint)
    assert (len(data.train), len(data.held_out)) == (63, 3)
    data = training_data(recipe_of(made.llama, made.prose, sequence_length=12, held_out=0.2), checkpoint)
    assert (len(data.train), len(data.held_out)) == (53, 13)
