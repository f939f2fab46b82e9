import math
from pathlib import Path
from typing import Any

import pairs
import pico
import picos
import pytest
import torch
from picos import scramble
from tasks import run_task
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.evaluation.knn import weighted_votes

CLASSES = ["circle", "square", "triangle", "star", "cross", "ring", "dot"]
TRAIN, TEST = range(21), range(21, 31)


def dinov2() -> Any:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
    )
    return scramble(Dinov2Model(config))


def resnet() -> Any:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(1)
    return ResNetModel(config).eval()


def rows_file(folder: Path, numbers: range, name: str) -> Path:
    rows = [{"image": pairs.picture_file(folder, i), "label": CLASSES[i % len(CLASSES)]} for i in numbers]
    return pairs.write_rows(folder, rows, name)


def run(model: Any, folder: Path, processor: Any = None, **options: Any) -> Any:
    train = str(rows_file(folder, TRAIN, "train.jsonl"))
    options = {"samples": None, "batch_size": 6, "train": train, "k": 5, **options}
    processor = processor or pico.vit(CLASSES)[1]
    return run_task("knn", model, processor, data=rows_file(folder, TEST, "test.jsonl"), **options)


@torch.no_grad()
def feature(model: Any, number: int, layer: int | None, pool: str) -> list[float]:
    """The feature of one picture, by its own forward; not normalised."""
    inputs = pico.vit(CLASSES)[1](images=pico.picture(number), return_tensors="pt")
    output = model(**inputs, output_hidden_states=True)
    state = output.last_hidden_state[0] if layer is None else output.hidden_states[layer][0]
    if state.ndim == 3:
        state = state.reshape(state.shape[0], -1).t()
    return (state[0] if pool == "cls" else state.mean(0)).tolist()


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize(
    ("build", "layer", "pool"),
    [(dinov2, None, "cls"), (dinov2, -4, "cls"), (dinov2, 2, "mean"), (resnet, None, "mean"), (resnet, 1, "mean")],
)
def test_votes_equal_those_counted_by_hand(build: Any, layer: int | None, pool: str, tmp_path: Path) -> None:
    model = build()
    result = run(model, tmp_path, layer=layer, pool=pool)
    known = [feature(model, i, layer, pool) for i in TRAIN]
    first, fifth = [], []
    for number in TEST:
        own = feature(model, number, layer, pool)
        near = sorted(((cosine(own, other), i % len(CLASSES)) for i, other in enumerate(known)), reverse=True)[:5]
        votes = [sum(math.exp(c / 0.07) for c, label in near if label == each) for each in range(len(CLASSES))]
        truth = number % len(CLASSES)
        behind = sum(vote >= votes[truth] for each, vote in enumerate(votes) if each != truth)
        first.append(float(behind < 1))
        fifth.append(float(behind < 5))
    assert [r["score"] for r in result.predictions] == first
    assert result.value == pytest.approx(sum(first) / len(first))
    assert result.others["top-5 accuracy"].value == pytest.approx(sum(fifth) / len(fifth))
    assert (result.metric, result.n, result.settings["voters"]) == ("top-1 accuracy", len(TEST), len(TRAIN))


def test_a_training_picture_finds_itself(tmp_path: Path) -> None:
    train = rows_file(tmp_path, TRAIN, "train.jsonl")
    result = run_task(
        "knn", dinov2(), pico.vit(CLASSES)[1], data=train, train=str(train), samples=None, batch_size=8, k=1
    )
    assert result.value == 1.0


def test_votes_at_any_temperature() -> None:
    cosines, classes = torch.tensor([[0.9, 0.5, 0.4, -1.0]]), torch.tensor([0, 1, 1, 1])
    hot = weighted_votes(cosines, classes, 2, k=3, temperature=100.0)[0]
    assert hot[1] / hot[0] == pytest.approx((math.exp(-0.004) + math.exp(-0.005)), rel=1e-4)
    cold = weighted_votes(cosines, classes, 2, k=3, temperature=1e-4)[0]
    assert cold.tolist() == [1.0, 0.0]


def test_two_towers_give_their_picture_embedding(tmp_path: Path) -> None:
    model, processor = pico.clip()
    scramble(model)
    result = run(model, tmp_path, processor, k=1)
    with torch.no_grad():
        features = [
            model.get_image_features(
                processor.image_processor(images=pico.picture(i), return_tensors="pt")["pixel_values"]
            ).pooler_output[0].tolist()
            for i in range(TEST.stop)
        ]  # fmt: skip
    for record, number in zip(result.predictions, TEST, strict=True):
        nearest = max(TRAIN, key=lambda i: cosine(features[number], features[i]))
        assert record["prediction"] == CLASSES[nearest % len(CLASSES)]


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    model = dinov2()
    for options, message in (
        ({"train": None}, "train=SOURCE"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"layer": 7}, "no layer 7.*0 to 4"),
    ):
        with pytest.raises(InvalidOption, match=message):
            run(model, tmp_path, **options)
    with pytest.raises(UnknownName, match="mean"):
        run(model, tmp_path, pool="maen")
    model, processor = pico.clip()
    with pytest.raises(InvalidOption, match="no backbone of one tower"):
        run(model, tmp_path, processor, layer=-2)


def test_texts_vote_by_the_mean_of_their_real_tokens(tmp_path: Path) -> None:
    model, words = picos.bert().bert, picos.tokenizer()
    texts = [
        "red circle",
        "a blue circle is left",
        "the small star",
        "a star",
        "large square and square",
        "square",
        "no",
    ]
    labels = ["circle", "circle", "star", "star", "square", "square", "circle"]
    rows = [{"question": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    train = pairs.write_rows(tmp_path, rows[:5], "train.jsonl")
    test = pairs.write_rows(tmp_path, rows[5:], "test.jsonl")
    result = run_task("knn", model, words, data=test, samples=None, batch_size=2, train=str(train), k=1)

    @torch.no_grad()
    def alone(text: str) -> list[float]:
        return model(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0).tolist()

    known = [alone(text) for text in texts[:5]]
    hits = 0
    for text, label in zip(texts[5:], labels[5:], strict=True):
        near = max(range(5), key=lambda i: cosine(alone(text), known[i]))
        hits += labels[near] == label
    assert result.value == hits / 2
    assert result.settings["pool"] == "mean"
