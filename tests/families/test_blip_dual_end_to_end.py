"""The BLIP line, ViLT and two towers through whole runs: folder in, sparse folder out, plain transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import blip, dual
from families.family import Family
from families.vlm_words import picture
from torch import Tensor, nn

from ecoflap.data import load_samples, make_batches, resolve
from ecoflap.data.objectives import on_device
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.patching import cache_disabled
from ecoflap.model.save import save
from ecoflap.model.trace import tensors_in
from ecoflap.run import pipeline
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

FAMILIES = {family.name: family for family in (*blip.FAMILIES, *dual.FAMILIES)}
ASKED = ("blip2_t5", "blip2_opt", "instructblip_t5", "instructblip_vicuna", "blip_vqa")  # the others get captions
CRITERIA = ("sparsegpt", "magnitude")
RUNS = [pytest.param(name, {"importance": "zeroth-order", "criterion": "wanda"}, id=name) for name in FAMILIES]
RUNS += [
    pytest.param(
        name, {"importance": "uniform", "criterion": CRITERIA[number % 2]}, id=f"{name}-{CRITERIA[number % 2]}"
    )
    for number, name in enumerate(FAMILIES)
]
ZERO_SHOT = {"objective": "zero-shot", "class_prompts": ("a {} .", "picture of the {}"), "importance": "zeroth-order"}
RUNS += [pytest.param(name, ZERO_SHOT, id=f"{name}-zero-shot") for name in ("clip", "siglip", "siglip2", "align")]
RUNS += [
    pytest.param("blip_retrieval", {"objective": "contrastive", "importance": "uniform"}, id="blip-itc"),
    pytest.param(
        "blip_caption", {"importance": "first-order", "importance_options": {"variant": "gradient"}}, id="1st"
    ),
]
QFORMERS = ("blip2_t5", "blip2_opt", "instructblip_t5", "instructblip_vicuna", "blip2_retrieval")
SHAPES, COLOURS = ("circle", "square", "triangle", "star"), ("red", "blue", "green")


def write_data(folder: Path, name: str, labels: bool) -> Path:
    """Six pictures of different sizes, with question and answer, caption, class, or two of them and a sentence."""
    lines = []
    for number in range(6):
        for side in ("left", "right"):
            picture(number + 10 * (side == "right"), 16 + 4 * (number % 3), 20).save(folder / f"{side}{number}.png")
        shape, colour = SHAPES[number % 4], COLOURS[number % 3]
        row: dict[str, Any] = {"image": f"left{number}.png"}
        if name == "vilt_nlvr2":
            sentence = f"the left picture is a {colour} {shape}" if number % 2 else f"there is a {shape}"
            row = {"image_0": f"left{number}.png", "image_1": f"right{number}.png", "sentence": sentence}
            row["label"] = str(bool(number % 2))
        elif name in ASKED:
            row |= {"question": f"what color is the {shape} ?"[7 * (number % 2) :], "answer": colour}
        elif labels:
            row["label"] = shape
        else:
            row["caption"] = f"a {colour} {shape}" + " of the picture" * (number % 2)
        lines.append(json.dumps(row))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_model(family: Family, folder: Path) -> Path:
    assert family.processor is not None
    family.build(seed=1).save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return folder


def outputs(model: nn.Module, batch: dict[str, Tensor], objective: str | None) -> list[Tensor]:
    """Every tensor that the model gives while its loss is computed, and the loss."""
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: found.extend(tensors_in(output)))
    try:
        with torch.no_grad(), cache_disabled(model):
            loss = on_device(resolve(objective, model))(model, batch)
            return [*found, loss]
    finally:
        handle.remove()


def run(family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Path]:
    """The pruned model in memory, and the run's folder."""
    kept: dict[str, Any] = {}

    def keep(checkpoint: Checkpoint, target: Path) -> Path:
        kept["model"] = checkpoint.model
        return save(checkpoint, target)

    monkeypatch.setattr(pipeline, "save", keep)
    monkeypatch.setattr("ecoflap.report.page.write_report", lambda folder: None)  # the slowest part
    source = write_model(family, folder / "dense")
    data = write_data(folder, family.name, labels=options.get("objective") == "zero-shot")
    recipe = Recipe(
        model=str(source), calibration=str(data), samples=5, importance_samples=2, batch_size=2, sparsity=0.5,
        device="cpu", **{"criterion": "wanda", **options},
    )  # fmt: skip
    return kept, run_recipe(recipe, folder / "run")


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_prune_save_and_load_again(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    kept, folder = run(family, tmp_path, monkeypatch, **options)
    pruned = kept["model"]
    loaded = getattr(transformers, type(pruned).__name__).from_pretrained(folder / "model", local_files_only=True)
    rows = json.loads((folder / "allocation.json").read_text())["layers"]
    weights = [loaded.get_parameter(row["name"]) for row in rows]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * sum(weight.numel() for weight in weights))
    assert {row["modality"] for row in rows} == {modality for modality, _ in family.towers}
    dense = type(loaded).from_pretrained(tmp_path / "dense", local_files_only=True).state_dict()
    changed = {key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, dense[key])}
    assert changed == {row["name"] for row in rows}

    assert family.processor is not None
    samples = load_samples(str(tmp_path / "data.jsonl"), samples=4, seed=0)
    objective, prompts = options.get("objective"), options.get("class_prompts")
    (batch,) = make_batches(
        samples, pruned, family.processor(), batch_size=4, objective=objective, class_prompts=prompts
    )
    ours, theirs = (outputs(model.eval(), batch, objective) for model in (pruned, loaded))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", QFORMERS)
def test_the_q_former_is_pruned_when_it_is_included(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, folder = run(FAMILIES[name], tmp_path, monkeypatch, importance="uniform", include=("qformer",))
    rows = [
        row for row in json.loads((folder / "allocation.json").read_text())["layers"] if row["modality"] == "bridge"
    ]
    assert len(rows) > 10
    for row in rows:
        weight = kept["model"].get_parameter(row["name"])
        assert int((weight == 0).sum()) == weight.numel() // 2, row["name"]
