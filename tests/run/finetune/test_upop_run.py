"""``ecoflap upop``: search, retraining and the smaller model, on pico models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import picos
import pytest
import torch
from console import model_weights
from test_finetune_run import StopAt

import ecoflap
from ecoflap.errors import EcoflapError, InfeasibleAllocation, InvalidOption
from ecoflap.report.card import write_card
from ecoflap.run.finetune import pipeline, train
from ecoflap.run.finetune.pipeline import run_finetune
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.log import Stopped


def recipe_of(model: Path, train: Path, **fields: object) -> UPop:
    given = {"batch_size": 4, "epochs": 2, "learning_rate": 3e-3, "warmup": 0.0, "update_every": 3, **fields}
    return UPop.parse({"model": str(model), "train": str(train), **given})


def _metrics(folder: Path):
    return json.loads((folder / "metrics.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def upopped(made, tmp_path_factory) -> Path:
    recipe = recipe_of(made.dense, made.prose, **made.text, sparsity=0.5)
    return run_finetune(recipe, tmp_path_factory.mktemp("upop") / "run")


def test_what_is_saved_is_smaller_and_loads_with_plain_transformers(upopped, made):
    metrics = _metrics(upopped)
    channels = metrics["channels"]
    old, new = channels["config"]["intermediate_size"]
    model = picos.FAMILIES["llama"].build().from_pretrained(upopped / "model")
    assert model.config.intermediate_size == new < old
    assert sum(p.numel() for p in model.parameters()) == channels["parameters"]["saved"]
    dense = picos.FAMILIES["llama"].build()
    assert sum(p.numel() for p in dense.parameters()) == channels["parameters"]["dense"]
    rows = {row["name"]: row for row in channels["groups"]}
    # Weights that are zero, and those that are no longer there, are the ones that the metrics count.
    left = 0
    for path, row in rows.items():
        consumer = model.get_submodule(path).weight
        heads = model.config.num_attention_heads if row["kind"] == "attention" else 1
        zeros = int((consumer == 0).all(0).sum())
        assert consumer.shape[1] - zeros == row["kept"] * heads
        parts = ("q_proj", "k_proj", "v_proj") if row["kind"] == "attention" else ("gate_proj", "up_proj")
        parent = model.get_submodule(path.rpartition(".")[0])
        left += consumer.shape[0] * row["kept"] * heads
        for part in parts:
            weight = getattr(parent, part).weight
            gone = int((weight == 0).all(1).sum())
            left += (weight.shape[0] - gone) * weight.shape[1]
    total = metrics["sparsity"]["prunable_parameters"]
    assert left == round((1 - metrics["sparsity"]["prunable"]) * total)
    assert abs(metrics["sparsity"]["prunable"] - 0.5) < 0.02
    assert metrics["finetuned"]["perplexity"]["value"] != metrics["pruned"]["perplexity"]["value"]


def test_what_is_said_of_it(upopped):
    page = (upopped / "report.html").read_text("utf-8")
    card = write_card(upopped).read_text("utf-8")
    assert "ecoflap upop" in page
    assert "intermediate_size" in page
    assert "intermediate\\_size" in card
    assert "finetune" not in card.replace("fine-tune", "")


def test_stopped_in_the_search_and_resumed_it_ends_with_the_same_bits(upopped, made, tmp_path, pageless):
    recipe = recipe_of(made.dense, made.prose, **made.text, sparsity=0.5)

    class InSearch(StopAt):
        def stage(self, name, total, done=0):
            return super().stage("fine-tuning" if name == "search" else "other", total, done)

    with pytest.raises(Stopped):
        run_finetune(recipe, tmp_path / "run", progress=InSearch(7))
    assert (tmp_path / "run" / "journal" / "search" / "checkpoint-7" / "masks.safetensors").is_file()
    with pytest.raises(Stopped):
        run_finetune(recipe, tmp_path / "run", resume=True, progress=StopAt(5))
    run_finetune(recipe, tmp_path / "run", resume=True)
    one, other = model_weights(upopped / "model"), model_weights(tmp_path / "run" / "model")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert _metrics(upopped)["channels"] == _metrics(tmp_path / "run")["channels"]


def test_a_vision_language_model_from_python(made, tmp_path, pageless):
    """One ranking over the towers; every size that its configuration has is used."""
    folder = ecoflap.upop(
        str(picos.write_checkpoint("blip2_t5", tmp_path / "dense", seed=3)), train=str(made.questions), sparsity=0.6,
        output=tmp_path / "out", batch_size=4, epochs=1, search_epochs=2, learning_rate=3e-3,
    )  # fmt: skip
    metrics = _metrics(folder)
    assert set(metrics["channels"]["config"]) <= {
        "vision_config.intermediate_size", "text_config.d_ff", "text_config.d_kv",
    }  # fmt: skip
    assert len({row["tower"] for row in metrics["channels"]["groups"]}) == 3
    model = picos.FAMILIES["blip2_t5"].build().from_pretrained(folder / "model")
    assert sum(p.numel() for p in model.parameters()) == metrics["channels"]["parameters"]["saved"]
    card = (folder / "model" / "README.md").read_text("utf-8")
    assert "upop" in card


def test_where_the_retraining_brings_nothing_the_searched_weights_stay(made, tmp_path, pageless, monkeypatch):
    """The saved model then is the one that the search ended with, whatever the last step of the retraining gave."""

    def in_vain(*given):
        return dataclasses.replace(train.train(*given), best=0)

    monkeypatch.setattr(pipeline, "train", in_vain)
    recipe = recipe_of(made.dense, made.prose, **made.text, sparsity=0.3, epochs=1)
    metrics = _metrics(run_finetune(recipe, tmp_path / "run"))
    found, searched = (metrics[when]["perplexity"]["value"] for when in ("finetuned", "pruned"))
    assert found == pytest.approx(searched, rel=1e-4)  # to rounding: the saved one is smaller
    assert metrics["channels"]["config"]


def test_the_command(run, made, tmp_path):
    """Its own folder by default, the numbers as JSON, and slips in one line."""
    run("upop", made.dense, "--sparsity", 0.5).refused("--train")
    run("upop", made.dense, "--train", made.prose, "--sparsity", 1.5).refused("sparsity")
    found = run(
        "upop", made.dense, "--train", made.prose, "--train-samples", 8, "--sequence-length", 12, "--sparsity", 0.4,
        "--epochs", 1, "--output", tmp_path / "out",
    ).well()  # fmt: skip
    assert "intermediate_size" in found.out
    assert "channels kept, attention" in found.out
    again = (tmp_path / "out" / "report.html").read_text("utf-8")
    run("report", tmp_path / "out").well()
    assert (tmp_path / "out" / "report.html").read_text("utf-8") == again
    run("upop", tmp_path / "out", "--train", made.prose).refused("is a run")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"train": None}, InvalidOption, "--train"),
        ({"tune": "lora"}, InvalidOption, "trains all weights"),
        ({"sparsity": 0.99}, InfeasibleAllocation, "at most"),
    ],
)
def test_slips_are_told_in_one_line(fields, error, words, made, tmp_path):
    given = {"model": str(made.dense), "train": str(made.prose), "sequence_length": 12, **fields}
    with pytest.raises(EcoflapError, match=words) as told:
        run_finetune(UPop.parse(given), tmp_path / "out")
    assert isinstance(told.value, error)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
