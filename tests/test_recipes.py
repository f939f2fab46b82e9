"""The recipes of the paper's experiments: each is read and checked, and run whole on a pico model and pico data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import picos
import published
import pytest
import yaml
from families import blip, dual, vision
from families.family import Family

from ecoflap.data import load_samples, make_batches
from ecoflap.data.class_names import class_names, class_templates
from ecoflap.data.objectives import OBJECTIVES
from ecoflap.model.checkpoint import load
from ecoflap.run.evaluations import check_evaluations
from ecoflap.run.finetune.pipeline import run_finetune
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
METHODS = sorted((FOLDER / "methods").glob("*.yaml"))
CLIP = FOLDER / "clip" / "clip-vit-b-16.yaml"
SETS = sorted(path for path in CLIP.parent.glob("*.yaml") if path != CLIP)
ROWS = {str(path.relative_to(FOLDER)): (path,) for path in sorted(FOLDER.glob("*/*.yaml"))
        if path.parent.name not in ("clip", "methods")}  # fmt: skip
ROWS |= {f"clip/{path.name}": (CLIP, path) for path in SETS}
CLASSES = {
    "caltech101": 102, "dtd": None, "eurosat": 10, "fgvc-aircraft": None, "food101": 101, "imagenet": 1000,
    "flowers102": 102, "pets": 37, "cars": 196, "sun397": 397, "ucf101": 101,
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_every_row_with_every_method(row: str) -> None:
    for method in METHODS:
        recipe = Recipe.load([*ROWS[row], method], {"sparsity": 0.5}).resolved()
        entries = check_evaluations(recipe)
        assert entries
        assert all(entry.test for entry in entries)
        assert recipe.objective is None or recipe.objective in OBJECTIVES
        assert recipe.calibration is not None
        assert recipe.model is not None
        assert recipe.samples == 128
        assert recipe.max_sparsity == 0.6
        stated = yaml.safe_load(method.read_text("utf-8"))
        assert {name: recipe.to_dict()[name] for name in stated} == stated
        assert Recipe.parse(recipe.to_dict()).resolved() == recipe


def test_the_rows_of_the_paper_are_all_there() -> None:
    assert set(CLASSES) == {path.stem for path in SETS}
    assert len(ROWS) == 2 + 1 + 2 + 11 + 4 + 1
    assert Recipe.load(ROWS["flan-t5/flan-t5-xl.yaml"]).aggregate == "mean"
    assert {entry.name for entry in Recipe.load(ROWS["blip2/blip2-flan-t5-xl.yaml"]).evaluations or ()} == {
        "vqav2", "okvqa", "gqa", "nocaps",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted((FOLDER / "blip" / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_fine_tuning_of_each_row_of_blip(path: Path) -> None:
    row, recipe = Recipe.load(path.parents[1] / path.name), Finetune.load(path, {"model": "a/run"})
    assert recipe.train == row.calibration
    assert (recipe.image_folder, recipe.prompt) == (row.image_folder, row.prompt)
    assert recipe.learning_rate is not None


@pytest.mark.parametrize("path", sorted((FOLDER / "blip" / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_upop_of_each_row_of_blip(path: Path) -> None:
    row = Recipe.load(path.parents[1] / path.name)
    recipe = UPop.load([path.parents[1] / path.name, path], {"sparsity": 0.75}).resolved()
    assert (recipe.model, recipe.train, recipe.sparsity) == (row.model, row.calibration, 0.75)
    assert recipe.search_epochs == recipe.epochs
    assert check_evaluations(recipe)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_prompts(name: str) -> None:
    recipe = Recipe.load([CLIP, CLIP.parent / f"{name}.yaml"])
    names, templates = class_names(recipe.classes), class_templates(recipe.class_prompts)
    assert (None if names is None else len(names)) == CLASSES[name]
    assert templates
    assert "photo of a" in templates[0] or "photo of" in templates[0]
    if name == "imagenet":
        assert names is not None
        assert (names[0], names[1], names[999], len(templates)) == ("tench", "goldfish", "toilet paper", 80)
    elif names is not None:
        assert len(set(names)) == len(names)


def test_the_readme_names_every_recipe_and_no_other() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    named = set(re.findall(r"recipes/([\w/.-]+\.yaml)", text))
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/**/*.yaml")}
    assert named <= there
    assert there - named == set()


# --- whole runs ----------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {family.name: family for family in (*blip.FAMILIES, *dual.FAMILIES, *vision.FAMILIES)}
PICOS = {
    "blip2/blip2-flan-t5-xl.yaml": "blip2_t5",
    "blip2/blip2-flickr30k.yaml": "blip2_retrieval",
    "blip/coco-caption.yaml": "blip_caption",
    "blip/flickr30k-retrieval.yaml": "blip_retrieval",
    "blip/vqav2.yaml": "blip_vqa",
    "blip/nlvr2.yaml": "vilt_nlvr2",
    "eva/eva-vit-g.yaml": "vit",
}
# What is on the hub, and what stands in for it here.
HUB = {
    "pixparse/cc3m-wds:train": "data/cc3m/000.tar",
    "allenai/c4:en:train": "data/c4.jsonl",
    "Salesforce/wikitext:wikitext-2-raw-v1:test": "data/wikitext.jsonl",
    "cais/mmlu:all:test": "data/mmlu-test.jsonl",
    "cais/mmlu:all:dev": "data/mmlu-dev.jsonl",
    "ILSVRC/imagenet-1k:train": "data/imagenet/train",
    "ILSVRC/imagenet-1k:validation": "data/imagenet/validation",
}
SMALL = {"samples": 6, "importance_samples": 2, "batch_size": 3, "device": "cpu"}
QUICK = {"new_tokens": 3, "min_tokens": 1, "beams": 2, "tokenizer": "simple", "metrics": "CIDEr"}


def _replaced(value: Any, table: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, table) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, table) for item in value]
    return table.get(value, value) if isinstance(value, str) else value


def _pico(paths: tuple[Path, ...], model: Path, **changes: Any) -> Recipe:
    """The recipe with a pico model, few samples, short texts; hub data by local files of the same columns."""
    values = _replaced(Recipe.load(paths).to_dict(), HUB)
    values |= {**SMALL, "model": str(model), **changes}
    if values["sequence_length"] is not None:
        values["sequence_length"] = 12
    for options in (values["task_options"], *(entry["options"] for entry in values["evaluations"] or ())):
        options |= {name: value for name, value in QUICK.items() if name in options}
    for task, options in [
        *((name, values["task_options"]) for name in values["task"] or ()),
        *((entry["task"], entry["options"]) for entry in values["evaluations"] or ()),
    ]:
        if task == "captioning":  # no Java here
            options |= {"tokenizer": "simple", "metrics": "CIDEr"}
    return Recipe.parse(values)


def _saved(family: Family, folder: Path) -> Path:
    assert family.processor is not None
    family.build(seed=1).save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return folder


def _blip2(root: Path) -> None:
    published.webdataset(root / "cc3m" / "000.tar")
    published.vqa(root / "vqav2", root / "coco" / "val2014", "v2_", "val2014")
    published.vqa(root / "okvqa", root / "coco" / "val2014", "", "val2014")
    published.gqa(root / "gqa")
    published.nocaps(root / "nocaps")


def _flickr(root: Path) -> None:
    published.webdataset(root / "cc3m" / "000.tar")
    published.karpathy(root / "flickr30k" / "dataset_flickr30k.json", root / "flickr30k" / "flickr30k-images", None)


def _vqav2(root: Path) -> None:
    published.vqa(root / "vqav2", root / "coco" / "train2014", "v2_", "train2014")
    published.vqa(root / "vqav2", root / "coco" / "val2014", "v2_", "val2014")


def _imagenet(root: Path) -> None:
    for split in ("train", "validation"):
        published.class_folders(root / "imagenet" / split, [f"LABEL_{i}" for i in range(picos.CLASSES)])


DATA: dict[str, Callable[[Path], None]] = {
    "blip2/blip2-flan-t5-xl.yaml": _blip2,
    "blip2/blip2-flickr30k.yaml": _flickr,
    "blip/coco-caption.yaml": lambda root: published.karpathy(
        root / "coco" / "dataset_coco.json", root / "coco", "val2014"
    ),
    "blip/flickr30k-retrieval.yaml": _flickr,
    "blip/vqav2.yaml": _vqav2,
    "blip/nlvr2.yaml": lambda root: published.nlvr2(root / "nlvr2"),
    "eva/eva-vit-g.yaml": _imagenet,
}


def _checked(recipe: Recipe, names: set[str]) -> dict[str, Any]:
    run = run_recipe(recipe, "run")
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    assert set(metrics["pruned"]) == set(metrics["dense"]) == names
    assert all(row["value"] is not None and row["n"] > 1 for row in metrics["pruned"].values())
    return metrics


def _checked_further(path: Path, names: set[str], tests: set[str]) -> None:
    """The fine-tuning of the run, for a few steps: its tests are those of the run, and its zeros stay."""
    recipe = Finetune.load(path, {"model": "run", "epochs": 1, "batch_size": 3, "device": "cpu"})
    if recipe.validation is not None:  # the pico data has two splits
        recipe = recipe.model_copy(update={"validation": recipe.validation.replace(":val", ":test")})
    metrics = json.loads((run_finetune(recipe, "tuned") / "metrics.json").read_text("utf-8"))
    assert metrics["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    assert set(metrics["finetuned"]) == names == tests
    assert metrics["training"]["steps"] > 0


@pytest.mark.parametrize("row", PICOS)
def test_a_whole_run_on_pico_data(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DATA[row](tmp_path / "data")
    recipe = _pico(ROWS[row], _saved(FAMILIES[PICOS[row]], tmp_path / "model"))
    names = {entry.name for entry in recipe.evaluations} if recipe.evaluations else set(recipe.task or ())
    metrics = _checked(recipe, names)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    further = FOLDER / "blip" / "finetune" / Path(row).name
    if row in ("blip/flickr30k-retrieval.yaml", "blip/vqav2.yaml"):  # the unusual objectives
        _checked_further(further, names, set(metrics["pruned"]))
    assert metrics["calibration"]["objective"] == (recipe.objective or metrics["calibration"]["objective"])


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("name", CLASSES)
def test_a_whole_run_of_clip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes and two templates of each data set; folders stand for the hub's."""
    monkeypatch.chdir(tmp_path)
    recipe = _pico((CLIP, CLIP.parent / f"{name}.yaml"), picos.write_checkpoint("clip", tmp_path / "model"))
    names = class_names(recipe.classes)
    folders = ["001", "002", "003"] if names else ["red", "green", "blue"]
    for split in ("train", "test"):
        published.class_folders(tmp_path / "data" / split, folders)
    small = recipe.model_copy(
        update={
            "calibration": "data/train", "test": "data/test", "columns": {}, "test_columns": {},
            "classes": names and names[:3], "class_prompts": (class_templates(recipe.class_prompts) or ())[:2],
        }
    )  # fmt: skip
    metrics = _checked(small, {"zero-shot"})
    assert metrics["pruned"]["zero-shot"]["n"] == 9


def test_class_names_are_in_the_texts_of_the_contrastive_loss(tmp_path: Path) -> None:
    published.class_folders(tmp_path / "train", ["001", "002"])
    checkpoint = load(str(picos.write_checkpoint("clip", tmp_path / "model")))
    drawn = load_samples(tmp_path / "train", samples=None, seed=0)
    batch, *_ = make_batches(
        drawn, checkpoint.model, checkpoint.processor, batch_size=6, objective="contrastive",
        classes=("red circle", "blue star"), class_prompts=("a {} .",),
    )  # fmt: skip
    texts = [checkpoint.processor.tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
    assert [text.replace(" ", "") for text in texts] == ["aredcircle."] * 3 + ["abluestar."] * 3


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_whole_run_of_llama(method: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published.c4(tmp_path / "data" / "c4.jsonl", picos.WORDS)
    published.wikitext(tmp_path / "data" / "wikitext.jsonl", picos.WORDS)
    paths = (*ROWS["llama/llama-7b.yaml"], method)
    _checked(_pico(paths, picos.write_checkpoint("llama", tmp_path / "model")), {"perplexity"})


def test_a_whole_run_of_flan_t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published.c4(tmp_path / "data" / "c4.jsonl", picos.WORDS)
    published.mmlu(tmp_path / "data" / "mmlu-test.jsonl", 6)
    published.mmlu(tmp_path / "data" / "mmlu-dev.jsonl", 10)
    recipe = _pico(ROWS["flan-t5/flan-t5-xl.yaml"], picos.write_checkpoint("t5", tmp_path / "model"))
    metrics = _checked(recipe, {"mmlu"})
    assert metrics["pruned"]["mmlu"]["settings"]["shots"] == 5
    assert metrics["pruned"]["mmlu"]["settings"]["shortened"] == 0
    assert set(metrics["pruned"]["mmlu"]["by_group"]) == set(published.SUBJECTS)
