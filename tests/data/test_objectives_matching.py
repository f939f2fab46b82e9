"""Matching with hard negatives (ITM) beside contrast (ITC), against single pairs run one at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import blip
from families.vlm_words import picture
from torch import nn

from ecoflap.data import Sample, SampleSet, make_batches, objective_name, resolve
from ecoflap.data.objectives import on_device
from ecoflap.data.objectives.matching import TEMPERATURE
from ecoflap.errors import CalibrationError
from ecoflap.importance.measure import measure_importance
from ecoflap.model.anatomy import discover

FAMILIES = {family.name: family for family in blip.FAMILIES}
FLAGS = {"blip_retrieval": "use_itm_head", "blip2_retrieval": "use_image_text_matching_head"}
TEXTS = ("a red circle", "a blue square of the picture", "a star", "two green objects")
both = pytest.mark.parametrize("name", list(FLAGS))


def made(name: str) -> tuple[nn.Module, Any]:
    family = FAMILIES[name]
    assert family.processor is not None
    return family.build(seed=2), family.processor()


def sample_set(*texts: str, groups: str = "") -> SampleSet:
    samples = tuple(Sample((picture(i, 16, 16),), None, text) for i, text in enumerate(texts))
    if groups:
        samples = tuple(replace(sample, group=group) for sample, group in zip(samples, groups, strict=True))
    return SampleSet(samples, tuple(range(len(samples))), 0, "data", {})


def scores(name: str, model: nn.Module, batch: dict[str, Any], image: int, text: int, match: bool) -> torch.Tensor:
    """What the model says of one picture and one text, without padding."""
    length = int(batch["attention_mask"][text].sum())
    one = {
        "pixel_values": batch["pixel_values"][image : image + 1],
        "input_ids": batch["input_ids"][text : text + 1, :length],
        "attention_mask": batch["attention_mask"][text : text + 1, :length],
    }
    with torch.no_grad():
        output = model(**one, **{FLAGS[name]: match})
    return (output.itm_score if name == "blip_retrieval" else output.logits_per_image)[0].double()


@both
def test_matching_and_contrast(name: str) -> None:
    model, processor = made(name)
    assert objective_name(None, model) == "itm-itc"
    (batch,) = make_batches(sample_set(*TEXTS), model, processor, batch_size=4)
    cosines = [[float(scores(name, model, batch, i, j, False)) for j in range(4)] for i in range(4)]
    wrong_texts = [max((j for j in range(4) if j != i), key=lambda j: cosines[i][j]) for i in range(4)]
    wrong_images = [max((i for i in range(4) if i != j), key=lambda i: cosines[i][j]) for j in range(4)]
    assert batch["negative_texts"].tolist() == wrong_texts
    assert batch["negative_images"].tolist() == wrong_images

    pairs = [(i, i, 1) for i in range(4)]
    pairs += [(i, wrong_texts[i], 0) for i in range(4)] + [(wrong_images[j], j, 0) for j in range(4)]
    itm = 0.0
    for image, text, label in pairs:
        logits = scores(name, model, batch, image, text, True)
        itm += math.log1p(math.exp(float(logits[1 - label] - logits[label]))) / len(pairs)
    itc = 0.0
    for i in range(4):
        itc += math.log(sum(math.exp((cosines[i][j] - cosines[i][i]) / TEMPERATURE) for j in range(4))) / 8
        itc += math.log(sum(math.exp((cosines[j][i] - cosines[i][i]) / TEMPERATURE) for j in range(4))) / 8
    with torch.no_grad():
        assert float(resolve(None, model)(model, batch)) == pytest.approx(itm + itc, rel=1e-4)
        alone = {key: value for key, value in batch.items() if not key.startswith("negative")}
        assert float(resolve("contrastive", model)(model, alone)) == pytest.approx(itc, rel=1e-4)


@both
def test_pictures_are_encoded_once_and_texts_of_both_kinds_reach_the_fusion(name: str) -> None:
    model, processor = made(name)
    (batch,) = make_batches(sample_set(*TEXTS), model, processor, batch_size=4)
    seen: list[int] = []
    first = model.vision_model.encoder.layers[0]  # type: ignore[union-attr, index]
    handle = first.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    anatomy = discover(model, batch, run=on_device(resolve(None, model)), include=("qformer",) * (name[4] == "2"))
    handle.remove()
    assert seen == [4]
    assert not any("reached" in entry.reason for entry in anatomy.unprunable)  # the cross-attention too


@both
def test_negatives_are_chosen_once(name: str) -> None:
    model, processor = made(name)
    first, second = (make_batches(sample_set(*TEXTS), model, processor, batch_size=2) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    before = {key: value.clone() for key, value in first[0].items()}
    losses = []
    objective = resolve(None, model)

    def noted(module: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        losses.append((batch["negative_texts"].tolist(), batch["negative_images"].tolist()))
        return objective(module, batch)

    measure_importance(model, first[:1], "zeroth-order", loss=noted)
    assert len(losses) > 10
    assert set(map(str, losses)) == {str(([1, 0], [1, 0]))}
    assert all(torch.equal(first[0][key], before[key]) for key in before)


def test_texts_of_one_picture_are_not_wrong() -> None:
    model, processor = made("blip_retrieval")
    for groups in ("aabb", "abab"):
        (batch,) = make_batches(sample_set(*TEXTS, groups=groups), model, processor, batch_size=4)
        for key in ("negative_texts", "negative_images"):
            assert all(groups[i] != groups[j] for i, j in enumerate(batch[key].tolist()))
    (batch,) = make_batches(sample_set("a star", "a star", "a circle"), model, processor, batch_size=3)
    assert batch["negative_texts"].tolist()[:2] == [2, 2]
    with pytest.raises(CalibrationError, match="only texts of one image") as caught:
        make_batches(sample_set(*TEXTS, groups="aaaa"), model, processor, batch_size=4)
    assert "\n" not in str(caught.value)


def test_batches_and_models_that_do_not_fit() -> None:
    model, processor = made("blip_retrieval")
    (batch,) = make_batches(sample_set(*TEXTS), model, processor, batch_size=4, objective="contrastive")
    with pytest.raises(CalibrationError, match="batches made for it"):
        resolve("itm-itc", model)(model, batch)
    extra = {"class_prompts": torch.tensor(1), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(CalibrationError, match="no image_embeds and text_embeds"):
        resolve("zero-shot", model)(model, {**batch, **extra})
    with pytest.raises(CalibrationError, match="at least 2 samples in a batch"):
        make_batches(sample_set(*TEXTS), model, processor, batch_size=1)
    captioner = FAMILIES["blip_caption"].build()
    for objective in ("contrastive", "itm-itc"):
        with pytest.raises(
            CalibrationError, match=r"neither a contrastive loss nor|needs an image-text retrieval model"
        ):
            resolve(objective, captioner)(captioner, batch)
