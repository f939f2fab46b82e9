"""From a folder to a run to plain ``from_pretrained``: the saved model answers bit for bit as it did in memory."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from console import prose
from families import moe, text, vision
from families.family import Family
from families.matrix import differences
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ecoflap.cli.tables import summary_table
from ecoflap.model.slices import stored_matrix
from ecoflap.model.trace import tensors_in
from ecoflap.run import names as files
from ecoflap.run import pipeline
from ecoflap.run.recipe import Recipe

FAMILIES = {f.name: f for f in (*text.FAMILIES, *vision.FAMILIES, *moe.FAMILIES) if f.processor is not None}
VISION = {family.name for family in vision.FAMILIES}


def pictures(folder: Path) -> Path:
    """Six pictures with a class each, as JSON lines."""
    rows = []
    for number in range(6):
        color = tuple(int(value) for value in torch.randint(256, (3,)))
        Image.new("RGB", (20, 16), color).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": str(number % 5)})
    path = folder / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    inputs = {name: value for name, value in batch.items() if name != "labels" or "pixel_values" not in batch}
    with torch.no_grad():
        return tensors_in(model.eval()(**inputs))


def write(family: Family, folder: Path, change: Any = None) -> Path:
    model = family.build(seed=0)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    assert family.processor is not None
    family.processor().save_pretrained(folder)
    return folder


def run_of(family: Family, model: Path, folder: Path, **options: Any) -> Path:
    data = pictures(folder) if family.name in VISION else prose(folder / "prose.txt")
    recipe = Recipe(
        model=str(model), calibration=str(data), samples=4, importance_samples=2, batch_size=2, sequence_length=16,
        objective=family.objective, **{"criterion": "wanda", **options},
    )  # fmt: skip
    return pipeline.run_recipe(recipe, folder / "run")


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_pruned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, in_memory = FAMILIES[name], []
    batch = family.batches(2, 2, padding=True)[0]
    save = pipeline.save

    def saving(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        in_memory.append(outputs(checkpoint.model, batch))
        return save(checkpoint, *args, **kwargs)

    monkeypatch.setattr(pipeline, "save", saving)
    path = run_of(family, write(family, tmp_path / "model"), tmp_path)
    loaded = type(family.build()).from_pretrained(path / "model")
    assert differences(outputs(loaded, batch), in_memory[0]) is None
    allocation = json.loads((path / "allocation.json").read_text("utf-8"))
    for row in allocation["layers"]:
        assert int((stored_matrix(loaded, row["name"]) == 0).sum()) == row["zeros"], row["name"]
    total = sum(row["weights"] for row in allocation["layers"])
    assert allocation["zeros"] == round(0.5 * total)
    metrics = json.loads((path / "metrics.json").read_text("utf-8"))
    sparsity = metrics["sparsity"]
    if name in ("mixtral", "qwen3_moe"):
        assert [len(counts) for counts in metrics["experts"].values()] == [4, 4]
    assert sparsity["model_parameters"] == sum(p.numel() for p in loaded.parameters())
    assert sparsity["model"] == allocation["zeros"] / sparsity["model_parameters"]
    assert allocation["model_sparsity"] == sparsity["model"]


def summary(path: Path) -> str:
    """What the run prints at its end."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(path))
    return console.export_text()


def test_experts_without_tokens_are_named_in_log_metrics_and_summary(tmp_path: Path) -> None:
    def two_of_four(model: nn.Module) -> None:
        """One of the first two experts has the largest logit, whatever the token."""
        for name, weight in model.named_parameters():
            if name.endswith("router.classifier.weight"):
                weight.data[1:] = weight.data[0] * torch.tensor([[-1.0], [0.5], [0.0]])

    family = FAMILIES["switch_transformers"]
    path = run_of(family, write(family, tmp_path / "model", two_of_four), tmp_path, importance="uniform")
    metrics = json.loads((path / "metrics.json").read_text("utf-8"))
    assert len(metrics["unreached"]) >= 2 * 2 * 2  # experts 2 and 3, wi and wo, of encoder and decoder
    idle = {"expert_2", "expert_3"}
    assert idle <= {name.split(".")[-3] for name in metrics["unreached"]}
    log = (path / files.LOG).read_text("utf-8")
    for name in metrics["unreached"]:
        assert f"no calibration token reached {name}: pruned without its own statistics" in log
    text = summary(path)
    assert f"{len(metrics['unreached'])} layers" in text
    assert metrics["unreached"][0] in text
