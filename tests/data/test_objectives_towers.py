"""Contrastive and zero-shot losses of two towers against formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import dual
from families.family import Family
from families.vlm_words import picture
from torch import nn

from ecoflap.data import Sample, SampleSet, make_batches, objective_name, resolve
from ecoflap.data.objectives import on_device
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.model.anatomy import discover

FAMILIES = {family.name: family for family in dual.FAMILIES}
WORDS = ("circle", "square", "triangle", "star", "object")
CLASSES, TEMPLATES = ("circle", "star", "red square"), ("a {} .", "picture of the {}", "{}")


def made(name: str, seed: int = 3) -> tuple[nn.Module, Any]:
    family: Family = FAMILIES[name]
    assert family.processor is not None
    return family.build(seed=seed), family.processor()


def sample_set(*labels: str, captions: bool = False, classes: tuple[str, ...] | None = None) -> SampleSet:
    samples = tuple(
        Sample((picture(i, 20, 16),), None, f"a {label}" if captions else label, label=None if captions else label)
        for i, label in enumerate(labels)
    )
    return SampleSet(samples, tuple(range(len(samples))), 0, "data", {}, classes=classes)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.pow(2).sum(-1, keepdim=True).sqrt()


def embeddings(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and texts in double precision, each of length 1."""
    with torch.no_grad():
        output = model(**batch)
    return unit(output.image_embeds.double()), unit(output.text_embeds.double())


def scale(model: Any) -> float:
    with torch.no_grad():
        return float(model.logit_scale.exp()) if hasattr(model, "logit_scale") else 1 / float(model.temperature)


@pytest.mark.parametrize("name", ["clip", "altclip", "chinese_clip", "align"])
def test_symmetric_contrast(name: str) -> None:
    model, processor = made(name)
    (batch,) = make_batches(sample_set(*WORDS, captions=True), model, processor, batch_size=5)
    assert objective_name(None, model) == "contrastive"
    with torch.no_grad():
        loss = float(resolve(None, model)(model, batch))
    pictures, texts = embeddings(model, batch)
    logits = scale(model) * pictures @ texts.T
    terms = []
    for i in range(5):
        terms.append(math.log(sum(math.exp(logits[i, j] - logits[i, i]) for j in range(5))))
        terms.append(math.log(sum(math.exp(logits[j, i] - logits[i, i]) for j in range(5))))
    assert loss == pytest.approx(sum(terms) / 10, rel=1e-4)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_pairwise_sigmoid(name: str) -> None:
    model, processor = made(name)
    (batch,) = make_batches(sample_set(*WORDS, captions=True), model, processor, batch_size=5)
    with torch.no_grad():
        loss = float(resolve(None, model)(model, batch))
    pictures, texts = embeddings(model, batch)
    logits = scale(model) * pictures @ texts.T + model.logit_bias.detach()  # type: ignore[operator, union-attr]
    # -1/B Σ_i Σ_j log σ(z_ij (t x_i·y_j + b)), z = 1 on the diagonal, else -1 (arXiv 2303.15343, algorithm 1).
    expected = sum(
        math.log1p(math.exp(-(1 if i == j else -1) * float(logits[i, j]))) for i in range(5) for j in range(5)
    )
    assert loss == pytest.approx(expected / 5, rel=1e-4)
    assert batch["input_ids"].shape[1] == 16  # padded to the length that it has learnt on


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1]], ids=["ensemble", "single"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_zero_shot_over_prompts(name: str, templates: tuple[str, ...]) -> None:
    model, processor = made(name)
    data = sample_set("star", "Circle", "2", "red square", "star")
    batches = make_batches(
        data, model, processor, batch_size=2, objective="zero-shot", classes=CLASSES, class_prompts=templates
    )
    assert [batch["labels"].tolist() for batch in batches] == [[1, 0], [2, 2], [1]]
    count = len(CLASSES) * len(templates)
    for batch in batches:
        assert len(batch["input_ids"]) == count
        assert int(batch["class_prompts"]) == len(templates)
        assert batch["input_ids"] is batches[0]["input_ids"]  # one tensor for all
    objective = resolve("zero-shot", model)
    for batch in batches:
        with torch.no_grad():
            loss = float(objective(model, batch))
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "class_prompts")}
        pictures, texts = embeddings(model, inputs)
        terms = []
        for i, label in enumerate(batch["labels"].tolist()):
            logits = []
            for c in range(len(CLASSES)):
                prompts = [texts[c * len(templates) + t] for t in range(len(templates))]
                mean = unit(sum(prompts) / len(templates))  # type: ignore[arg-type]
                logits.append(scale(model) * float(pictures[i] @ mean))
            terms.append(math.log(sum(math.exp(one - logits[label]) for one in logits)))
        assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=1e-6)


def test_prompts_say_what_the_templates_say_and_reach_the_text_tower() -> None:
    model, processor = made("clip")
    (batch,) = make_batches(
        sample_set("star", "circle"), model, processor, batch_size=2, objective="zero-shot", class_prompts=TEMPLATES[:2]
    )
    said = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert said == ["a circle .", "picture of the circle", "a star .", "picture of the star"]  # classes by name
    anatomy = discover(model, batch, run=on_device(resolve("zero-shot", model)))
    assert [tower.modality for tower in anatomy.towers] == ["vision", "language"]


def test_class_names_stand_for_the_data_sets_own_by_number() -> None:
    model, processor = made("clip")
    data = sample_set("n02", "n01", "n02", classes=("n01", "n02"))
    (batch,) = make_batches(data, model, processor, batch_size=3, objective="zero-shot", classes=("circle", "star"))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert processor.tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "a of a star ."


def test_contrast_of_classes_takes_their_prompts() -> None:
    model, processor = made("clip")
    (batch,) = make_batches(sample_set("star", "circle"), model, processor, batch_size=2, class_prompts=("the {} .",))
    said = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert said == ["the star .", "the circle ."]


@pytest.mark.parametrize(
    ("options", "labels", "error", "message"),
    [
        ({"class_prompts": ("a photo",)}, ("star", "circle"), InvalidOption, "'a photo' has no {}"),
        ({}, ("star", "star"), InvalidOption, "needs two classes and a template at least, not 1 and 1"),
        (
            {"classes": ("star", "circle")},
            ("star", "square"),
            CalibrationError,
            "label 'square' is none of the given 2",
        ),
        ({"classes": ("star", "circle")}, ("star", "2"), CalibrationError, "label '2' is none of the given 2 classes"),
    ],
)
def test_zero_shot_refusals(options: dict[str, Any], labels: tuple[str, ...], error: Any, message: str) -> None:
    model, processor = made("clip")
    with pytest.raises(error, match=message) as caught:
        make_batches(sample_set(*labels), model, processor, batch_size=2, objective="zero-shot", **options)
    assert "\n" not in str(caught.value)


def test_batches_and_models_that_do_not_fit() -> None:
    model, processor = made("clip")
    (pairs,) = make_batches(sample_set("star", "circle", captions=True), model, processor, batch_size=2)
    with pytest.raises(CalibrationError, match="no class prompts and labels: make it with objective='zero-shot'"):
        resolve("zero-shot", model)(model, pairs)
    unseen = SampleSet(tuple(Sample((), None, word) for word in WORDS), (0, 1, 2, 3, 4), 0, "data", {})
    for objective in ("contrastive", "zero-shot"):
        with pytest.raises(CalibrationError, match=f"no images, but objective '{objective}' needs them"):
            make_batches(unseen, model, processor, batch_size=2, objective=objective)
        with pytest.raises(CalibrationError, match="both an image processor and a tokenizer"):
            make_batches(unseen, model, processor.tokenizer, batch_size=2, objective=objective)
    with pytest.raises(CalibrationError, match="at least 2 samples in a batch"):
        make_batches(sample_set("star", "circle", captions=True), model, processor, batch_size=1)
