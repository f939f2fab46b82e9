"""Two-picture classification, answers and captions of BLIP, and what an instructed Q-Former may read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
import transformers
from families import blip
from families.vlm_words import picture
from families.words import START, bert_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from ecoflap.data import Sample, SampleSet, load_samples, make_batches, objective_name, resolve
from ecoflap.data.objectives import check_image_matters, on_device
from ecoflap.errors import CalibrationError

FAMILIES = {family.name: family for family in blip.FAMILIES}


def made(name: str) -> tuple[nn.Module, Any]:
    family = FAMILIES[name]
    assert family.processor is not None
    return family.build(seed=2), family.processor()


def batch_of(model: nn.Module, processor: Any, *samples: Sample, **options: Any) -> dict[str, Any]:
    numbers = tuple(range(len(samples)))
    made = SampleSet(samples, numbers, 0, "data", {})
    (batch,) = make_batches(made, model, processor, batch_size=len(samples), **options)
    return batch


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("blip2_t5", "seq2seq"), ("blip2_opt", "lm"), ("instructblip_t5", "seq2seq"), ("instructblip_vicuna", "lm"),
        ("blip_caption", "lm"), ("blip_vqa", "seq2seq"), ("blip_retrieval", "itm-itc"), ("blip2_retrieval", "itm-itc"),
        ("vilt_nlvr2", "classification"),
    ],
)  # fmt: skip
def test_objective_follows_the_class(name: str, objective: str) -> None:
    assert objective_name(None, FAMILIES[name].build()) == objective


def pair(number: int, sentence: str, label: str | None) -> Sample:
    pictures = (picture(number, 16, 16), picture(number + 5, 24, 16))
    return Sample(pictures, f"Question: {sentence}", label, question=sentence, label=label)


def test_two_pictures_and_a_sentence() -> None:
    model, processor = made("vilt_nlvr2")
    samples = (pair(0, "a red circle", "True"), pair(1, "two objects of the left picture", "false"), pair(2, "a", "1"))
    batch = batch_of(model, processor, *samples)
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["pixel_values"].shape[:2] == (3, 2)
    assert batch["pixel_mask"].shape[:2] == (3, 2)
    said = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert said == ["a red circle", "two objects of the left picture", "a"]  # without the words of a prompt
    objective = on_device(resolve(None, model))
    state = torch.get_rng_state()
    with torch.no_grad():
        loss = objective(model, batch)
        torch.rand(3)
        assert torch.equal(objective(model, batch), loss)  # ViLT puts its patches in random order
        assert torch.equal(torch.rand(3), torch.rand(3, generator=_after(state, 3)))
        alone = [_logits(model, processor, sample) for sample in samples]
    assert float(loss) == pytest.approx(float(cross_entropy(torch.stack(alone), batch["labels"])), rel=1e-4)
    check_image_matters(model, batch, resolve(None, model))


def _after(state: torch.Tensor, drawn: int) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    torch.rand(drawn, generator=generator)
    return generator


def _logits(model: nn.Module, processor: Any, sample: Sample) -> torch.Tensor:
    """As transformers' documentation runs the model, one sample at a time."""
    encoded = processor(list(sample.images), sample.question, return_tensors="pt")
    inputs = {"pixel_values": encoded["pixel_values"][None], "pixel_mask": encoded["pixel_mask"][None]}
    return model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **inputs).logits[0]


def test_refusals_of_classification() -> None:
    model, processor = made("vilt_nlvr2")
    one = Sample((picture(0, 16, 16),), None, "a circle", label="True")
    with pytest.raises(
        CalibrationError,
        match="needs 2 images with every sample, but one of",
    ):
        batch_of(model, processor, one)
    with pytest.raises(CalibrationError, match="no class column, but Vilt"):
        batch_of(model, processor, pair(0, "a circle", None))
    with pytest.raises(CalibrationError, match="label 'maybe' is none of the model's 2 classes"):
        batch_of(model, processor, pair(0, "a circle", "maybe"))
    with pytest.raises(CalibrationError, match="no labels, so there is no classification loss"):
        resolve(None, model)(model, {"pixel_values": torch.zeros(1, 2, 3, 16, 16)})


def test_a_classifier_of_texts() -> None:
    config = transformers.BertConfig(**{**picos.bert().config.to_dict(), "num_labels": 3})
    model = picos.scramble(transformers.BertForSequenceClassification(config))
    tokenizer = bert_tokenizer()
    samples = [Sample((), None, text, label=label) for text, label in (("a red circle", "2"), ("how many", "0"))]
    batch = batch_of(model, tokenizer, *samples)
    assert batch["labels"].tolist() == [2, 0]
    with torch.no_grad():
        logits = [model(**tokenizer(s.text, return_tensors="pt")).logits[0] for s in samples]
        assert float(resolve(None, model)(model, batch)) == pytest.approx(
            float(cross_entropy(torch.stack(logits), batch["labels"])), rel=1e-4
        )


def test_a_classifier_reads_the_rows_of_a_table(tmp_path: Path) -> None:
    model = picos.scramble(transformers.BertForSequenceClassification(picos.bert().config))
    file = tmp_path / "texts.jsonl"
    texts = ["a red circle", "how many", "blue", "no star there", "left of the square"]
    file.write_text("".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)), "utf-8")
    drawn = load_samples(file, samples=4, seed=3)
    batches = make_batches(drawn, model, bert_tokenizer(), batch_size=3)
    assert [len(batch["labels"]) for batch in batches] == [3, 1]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [index % 2 for index in drawn.indices[:4]]
    alone = bert_tokenizer()(texts[drawn.indices[0]])["input_ids"]
    assert batches[0]["input_ids"][0, : len(alone)].tolist() == alone
    with pytest.warns(UserWarning, match="holds 5 usable samples, 6 were asked for: all of them"):
        few = make_batches(load_samples(file, samples=6, seed=0), model, bert_tokenizer(), batch_size=3)
    assert [len(batch["labels"]) for batch in few] == [3, 2]
    file.write_text('{"text": "a red circle"}\n', "utf-8")
    with pytest.raises(CalibrationError, match="no class column, but Bert"):
        make_batches(load_samples(file, samples=4, seed=0), model, bert_tokenizer(), batch_size=3)


def test_answers_of_blip() -> None:
    model, processor = made("blip_vqa")
    samples = [
        Sample((picture(0, 16, 16),), "Question: how many Short answer:", "one", question="how many objects"),
        Sample((picture(1, 16, 16),), "Question: what color Short answer:", "red and blue", question="what color is"),
    ]
    batch = batch_of(model, processor, *samples)
    words = processor.tokenizer
    # Of one length: transformers 5.23 forgets the mask of BLIP's cross-attention, which sees a question's padding.
    assert words.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["how many objects", "what color is"]
    ids = [START, *words("one", add_special_tokens=False)["input_ids"], picos.EOS]
    assert batch["decoder_input_ids"][0].tolist() == [*ids, picos.PAD, picos.PAD]
    assert batch["labels"][0].tolist() == [*ids, -100, -100]
    with torch.no_grad():
        loss = resolve(None, model)(model, batch)
        total, count = 0.0, 0
        for number, sample in enumerate(samples):  # one at a time, with no padding anywhere
            asked = processor(sample.images[0], sample.question, return_tensors="pt")
            features = model.vision_model(asked["pixel_values"])[0]  # type: ignore[operator]
            question = model.text_encoder(asked["input_ids"], encoder_hidden_states=features)[0]  # type: ignore[operator]
            answer = batch["labels"][number][batch["labels"][number] != -100][None]
            logits = model.text_decoder(answer, encoder_hidden_states=question).logits[0]  # type: ignore[operator]
            total += float(cross_entropy(logits[:-1], answer[0, 1:], reduction="sum"))
            count += answer.shape[1] - 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(CalibrationError, match="lacks a question, an answer or an image"):
        batch_of(model, processor, Sample((picture(0, 16, 16),), None, "a caption"))


def test_captions_of_blip_begin_with_the_decoders_own_token() -> None:
    model, processor = made("blip_caption")
    texts = ("a red circle", "two objects and a star")
    batch = batch_of(model, processor, *(Sample((picture(i, 16, 16),), None, text) for i, text in enumerate(texts)))
    assert batch["input_ids"][:, 0].tolist() == [START, START]
    kept = [row[row != -100].tolist() for row in batch["labels"]]
    expected = [[*processor.tokenizer(t, add_special_tokens=False)["input_ids"], picos.EOS] for t in texts]
    assert kept == expected
    with torch.no_grad():
        loss = resolve(None, model)(model, batch)
        logits = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits
    rows = [
        cross_entropy(row[: len(ids)], torch.tensor(ids), reduction="sum")
        for row, ids in zip(logits, kept, strict=True)
    ]
    assert float(loss) == pytest.approx(float(sum(rows)) / sum(map(len, kept)), rel=1e-4)


def test_an_instructed_q_former_does_not_read_the_answer() -> None:
    model, processor = made("instructblip_vicuna")
    samples = [
        Sample((picture(i, 16, 16),), "what color is the star", answer) for i, answer in enumerate(("red", "blue"))
    ]
    batch = batch_of(model, processor, *samples)
    read = processor.qformer_tokenizer.batch_decode(batch["qformer_input_ids"], skip_special_tokens=True)
    assert read == ["what color is the star"] * 2
    said = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [text.split()[-1] for text in said] == ["red", "blue"]
