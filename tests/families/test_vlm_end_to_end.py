"""Each vision-language family through the whole pipeline: folder in, sparse folder out, plain transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import vlm
from families.family import Family
from families.vlm_words import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from ecoflap.model.checkpoint import Checkpoint, load
from ecoflap.model.save import save
from ecoflap.run import pipeline
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

FAMILIES = tuple(family for family in vlm.FAMILIES if family.processor is not None)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
EVENLY = ("qwen2_5_vl", "mllama", "florence2")  # pruned with one sparsity for all too
RUNS = [pytest.param(family, "zeroth-order", id=family.name) for family in FAMILIES]
RUNS += [pytest.param(f, "uniform", id=f"{f.name}-uniform") for f in FAMILIES if f.name in EVENLY]
ANSWERS = ("red", "two", "a star", "no cat there")


def write_data(folder: Path) -> Path:
    """Six questions with pictures of different sizes."""
    lines = []
    for number in range(6):
        name = f"{number}.png"
        picture(number, *vlm.SIZES[number % 4]).save(folder / name)
        question = vlm.QUESTIONS[number % 4][0]
        lines.append(json.dumps({"image": name, "question": question, "answer": ANSWERS[number % 4]}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize(("family", "importance"), RUNS)
def test_prune_save_load_answer(
    family: Family, importance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "dense"
    assert family.processor is not None
    family.build(seed=1).save_pretrained(source)
    family.processor().save_pretrained(source)
    data = write_data(tmp_path)
    kept: dict[str, Any] = {}

    def keep(checkpoint: Checkpoint, folder: Path) -> Path:
        kept["model"] = checkpoint.model
        return save(checkpoint, folder)

    monkeypatch.setattr(pipeline, "save", keep)
    recipe = Recipe(
        model=str(source), calibration=str(data), samples=4, importance_samples=2, batch_size=2, importance=importance,
        criterion="wanda", sparsity=0.5, task=("vqa",), test=str(data), test_samples=3, device="cpu",
    )  # fmt: skip
    run = run_recipe(recipe, tmp_path / "run")

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["pruned"]["vqa"]["n"] == metrics["dense"]["vqa"]["n"] == 3
    pruned = kept["model"]
    loaded = AutoModelForImageTextToText.from_pretrained(run / "model", local_files_only=True).eval()
    assert type(loaded) is type(pruned)
    zeros = total = 0
    for row in json.loads((run / "allocation.json").read_text())["layers"]:
        weight = loaded.get_parameter(row["name"])
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert zeros == round(0.5 * total)
    batch = family.batches(padding=True)[0]
    with torch.no_grad():
        ours, theirs = (model(**batch, use_cache=False).logits for model in (pruned, loaded))
    assert torch.equal(ours, theirs)


@every_family
def test_processor_is_saved_as_it_came(family: Family, tmp_path: Path) -> None:
    assert family.processor is not None
    family.build().save_pretrained(tmp_path / "a")
    family.processor().save_pretrained(tmp_path / "a")
    save(load(tmp_path / "a", device="cpu"), tmp_path / "b")
    for name in ("processor_config.json", "chat_template.jinja"):
        texts = [path.read_text() if (path := tmp_path / folder / name).exists() else None for folder in "ab"]
        assert texts[0] == texts[1], name
    if "video_processor" not in type(family.processor()).get_attributes():
        AutoProcessor.from_pretrained(tmp_path / "b", local_files_only=True)
