from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
import torch
from picos import scramble
from tasks import run_task
from transformers import SwinConfig, SwinForImageClassification

from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss

CLASSES = ["Circle", "square", "triangle", "star", "cross", "ring", "dot"]
PICTURES = 12


def vit() -> tuple[Any, Any]:
    model, processor = pico.vit(CLASSES)
    return scramble(model), processor


def swin() -> tuple[Any, Any]:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
    )
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {name: i for i, name in enumerate(CLASSES)}
    return scramble(SwinForImageClassification(config)), pico.vit(CLASSES)[1]


def rows_file(folder: Path, labels: list[Any], name: str = "data.jsonl") -> Path:
    return pairs.write_rows(
        folder, [{"image": pairs.picture_file(folder, i), "label": label} for i, label in enumerate(labels)], name
    )


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    options = {"samples": None, "batch_size": 5, **options}
    return run_task("image-classification", model, processor, data=data, **options)


@torch.no_grad()
def logits_of(model: Any, processor: Any, number: int) -> list[float]:
    return model(**processor(images=pico.picture(number), return_tensors="pt")).logits[0].tolist()


@pytest.mark.parametrize("build", [vit, swin])
def test_accuracy_equals_that_of_single_forwards(build: Any, tmp_path: Path) -> None:
    model, processor = build()
    model.train()
    truth = [i % len(CLASSES) for i in range(PICTURES)]
    result = run(model, processor, rows_file(tmp_path, [CLASSES[c].upper() for c in truth]))
    assert model.training
    model.eval()
    orders = [torch.tensor(logits_of(model, processor, i)).argsort(descending=True).tolist() for i in range(PICTURES)]
    first = [float(order[0] == c) for order, c in zip(orders, truth, strict=True)]
    fifth = [float(c in order[:5]) for order, c in zip(orders, truth, strict=True)]
    p = sum(first) / PICTURES
    assert (result.value, result.stderr) == pytest.approx((p, (p * (1 - p) / (PICTURES - 1)) ** 0.5))
    assert result.others["top-5 accuracy"].value == pytest.approx(sum(fifth) / PICTURES)
    assert [r["prediction"] for r in result.predictions] == [CLASSES[order[0]] for order in orders]
    assert [r["truth"] for r in result.predictions] == [CLASSES[c] for c in truth]
    assert (result.metric, result.settings["labels"]) == ("top-1 accuracy", "by name")


def test_labels_by_number_by_order_and_as_given(tmp_path: Path) -> None:
    model, processor = vit()
    truth = [i % len(CLASSES) for i in range(PICTURES)]
    wanted = run(model, processor, rows_file(tmp_path, [CLASSES[c] for c in truth])).predictions
    assert run(model, processor, rows_file(tmp_path, truth, "numbers.jsonl")).predictions == wanted
    given = run(
        model, processor, rows_file(tmp_path, [f"n{9 - c}" for c in truth], "codes.jsonl"),
        classes=[f"n{9 - c}" for c in range(len(CLASSES))],
    )  # fmt: skip
    assert (given.predictions, given.settings["labels"]) == (wanted, "as given")
    for number, label in enumerate(truth):
        folder = tmp_path / "set" / f"n{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        pairs.picture_file(folder, number)
    ordered = run(model, processor, tmp_path / "set")
    assert ordered.settings["labels"] == "by order"
    assert ordered.value == sum(r["score"] for r in wanted) / PICTURES


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    model, processor = vit()
    data = rows_file(tmp_path, ["circle", "hexagon"])
    with pytest.raises(CalibrationError, match="label 'hexagon' is none of the model's 7 classes"):
        run(model, processor, data)
    with pytest.raises(InvalidOption, match=r"2 classes are given.*has 7"):
        run(model, processor, data, classes=["a", "b"])
    with pytest.raises(InvalidOption, match="classifies images, not CLIPModel"):
        run(*pico.clip(), data)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="score of a class"):
        run(model, processor, rows_file(tmp_path, ["circle", "star"]))
