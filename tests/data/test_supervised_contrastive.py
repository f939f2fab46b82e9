"""The loss of backbones without a head, against a loop over pairs; batches of labelled pictures and texts."""

from __future__ import annotations

import math

import pico
import picos
import pytest
import torch
from transformers import BertModel, Dinov2Config, Dinov2Model

from ecoflap.data import SampleSet, make_batches, objective_name, resolve
from ecoflap.data.objectives.supervised_contrastive import TEMPERATURE, supervised_contrastive
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError

LABELS = ["tools", "food", "tools", "plants", "food", "tools"]


def dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=picos.IMAGE, patch_size=picos.PATCH
    )
    return picos.scramble(Dinov2Model(config))


def bert() -> BertModel:
    return picos.bert().bert


def by_pairs(features: torch.Tensor, labels: list[int]) -> float:
    """Equation 2 of the paper, pair by pair."""
    z = [row / row.norm() for row in features.double()]
    losses = []
    for i, own in enumerate(labels):
        others = [a for a in range(len(labels)) if a != i]
        same_class = [p for p in others if labels[p] == own]
        below = sum(math.exp(float(z[i] @ z[a]) / TEMPERATURE) for a in others)
        if same_class:
            logs = [math.log(math.exp(float(z[i] @ z[p]) / TEMPERATURE) / below) for p in same_class]
            losses.append(-sum(logs) / len(same_class))
    return sum(losses) / len(losses)


def test_pictures() -> None:
    model = dinov2()
    samples = tuple(Sample((pico.picture(i),), label=label) for i, label in enumerate(LABELS))
    assert objective_name(None, model) == "supervised-contrastive"
    (batch,) = make_batches(SampleSet(samples, range(6), 0, "x", {}), model, picos.processor("vit"), batch_size=6)  # type: ignore[arg-type]
    assert batch["labels"].tolist() == [2, 0, 2, 1, 0, 2]  # by name
    with torch.no_grad():
        wanted = by_pairs(model(pixel_values=batch["pixel_values"]).pooler_output, batch["labels"].tolist())
        assert float(resolve(None, model)(model, batch)) == pytest.approx(wanted, rel=1e-4)


def test_texts_of_different_length() -> None:
    model, words = bert(), picos.tokenizer()
    texts = ["a red circle", "blue", "what color is the small star", "left of", "a triangle and a square", "yes"]
    samples = tuple(Sample(text=text, label=label) for text, label in zip(texts, LABELS, strict=True))
    (batch,) = make_batches(SampleSet(samples, range(6), 0, "x", {}), model, words, batch_size=6)  # type: ignore[arg-type]
    with torch.no_grad():
        alone = [model(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        wanted = by_pairs(torch.stack(alone), batch["labels"].tolist())
        assert float(supervised_contrastive(model, batch)) == pytest.approx(wanted, rel=1e-3)


def test_what_cannot_be_contrasted_is_one_line() -> None:
    model = dinov2()
    lone = tuple(Sample((pico.picture(i),), label=str(i)) for i in range(3))
    (batch,) = make_batches(SampleSet(lone, range(3), 0, "x", {}), model, picos.processor("vit"), batch_size=3)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="of one class"):
        supervised_contrastive(model, batch)
    with pytest.raises(CalibrationError, match="class column"):
        supervised_contrastive(model, {"pixel_values": batch["pixel_values"]})
