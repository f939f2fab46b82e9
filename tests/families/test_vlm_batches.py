"""Batches of every vision-language family: labels, padding, several pictures, chats."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import vlm
from families.family import Family
from families.vlm_words import picture
from torch import nn

from ecoflap.data import Sample, SampleSet, batch_size_of, is_encoder_decoder, make_batches
from ecoflap.data.prompts import Prompter, tokenizer_of
from ecoflap.errors import CalibrationError
from ecoflap.evaluation.generate import generate

FAMILIES = tuple(family for family in vlm.FAMILIES if family.processor is not None)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
ONE_PICTURE = ("florence2", "kosmos2")  # what their processors take beside a text
SILENT = ("paligemma", "aya_vision")  # tied embeddings at random repeat the last token, a mark that is not shown
CHATS = tuple(f for f in FAMILIES if f.name not in ("paligemma", "florence2", "kosmos2"))


@cache
def model_of(family: Family) -> Any:
    return family.build(seed=0)


def set_of(*samples: Sample) -> SampleSet:
    return SampleSet(samples, tuple(range(len(samples))), 0, "samples", {})


def batches_of(family: Family, samples: SampleSet, batch_size: int = 9) -> list[dict[str, Any]]:
    assert family.processor is not None
    return make_batches(samples, model_of(family), family.processor(), batch_size=batch_size)


@torch.no_grad()
def token_losses(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    """Cross-entropy of each labelled token by its own formula."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if is_encoder_decoder(model):
        logits = model(**batch, use_cache=False).logits
    else:
        logits, labels = model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
    return nll[labels.flatten() != -100].tolist()


@every_family
def test_padding_and_other_pictures_change_nothing(family: Family) -> None:
    """Texts and pictures of different sizes in one batch cost what they cost one at a time."""
    samples = vlm.samples(4, padding=True, seed=3)
    (batch,) = batches_of(family, samples)
    singles = batches_of(family, samples, batch_size=1)
    alone = [loss for single in singles for loss in token_losses(model_of(family), single)]
    assert token_losses(model_of(family), batch) == pytest.approx(alone, rel=1e-3, abs=1e-4)
    assert batch_size_of(batch) == 4
    assert bool((batch["attention_mask"] == 0).any())


@every_family
def test_labels_are_the_answer_and_its_end(family: Family) -> None:
    samples = vlm.samples(4, padding=True, seed=0)
    assert family.processor is not None
    words: Any = tokenizer_of(family.processor())
    for size in (4, 1):
        for start, batch in enumerate(batches_of(family, samples, size)):
            for row, labels in enumerate(batch["labels"]):
                kept = labels[labels != -100]
                said = words.decode(kept, skip_special_tokens=True)
                assert said.split() == (samples.samples[start * size + row].text or "").split()
                assert words.added_tokens_decoder[int(kept[-1])].special  # the end
                if not is_encoder_decoder(model_of(family)):
                    where = (labels != -100).nonzero().flatten()
                    assert torch.equal(batch["input_ids"][row, where], kept)
                    assert int(where[-1]) == int(batch["attention_mask"][row].nonzero()[-1])
                    assert torch.equal(where, torch.arange(int(where[0]), int(where[-1]) + 1))


def _shown(number: int, count: int, text: str = "two") -> Sample:
    images = tuple(picture(10 * number + i, *vlm.SIZES[(number + i) % 4]) for i in range(count))
    return Sample(images, "Question: how many ? Short answer:", text, "how many ?")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ONE_PICTURE], ids=lambda f: f.name)
def test_two_pictures_beside_one(family: Family) -> None:
    samples = set_of(_shown(0, 2), _shown(1, 1, "one cat"))
    (batch,) = batches_of(family, samples)
    alone = [loss for b in batches_of(family, samples, 1) for loss in token_losses(model_of(family), b)]
    if family.name != "mllama":  # there what stands before a picture attends to all, also to pictures that are none
        assert token_losses(model_of(family), batch) == pytest.approx(alone, rel=1e-3, abs=1e-4)
    (other,) = batches_of(family, set_of(_shown(0, 1), _shown(1, 1, "one cat")))
    changed = token_losses(model_of(family), other)
    assert changed[: len(alone) - 3] != pytest.approx(alone[: len(alone) - 3], rel=1e-3)  # the second one is seen


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ONE_PICTURE], ids=lambda f: f.name)
def test_a_text_alone_beside_a_picture(family: Family) -> None:
    text = Sample((), "Question: what color is red ? Short answer:", "blue", "what color is red ?")
    samples = set_of(_shown(0, 1), text)
    (batch,) = batches_of(family, samples)
    (alone,) = batches_of(family, set_of(text))
    assert not [name for name in alone if name.startswith("pixel_values")]
    for found in (batch, alone):
        losses = token_losses(model_of(family), found)
        assert all(torch.isfinite(torch.tensor(losses)))
        kept = found["labels"][-1][found["labels"][-1] != -100]
        assert kept.tolist() == batch["labels"][-1][batch["labels"][-1] != -100].tolist()


def test_what_a_processor_refuses_is_one_line() -> None:
    florence = next(f for f in FAMILIES if f.name == "florence2")
    with pytest.raises(CalibrationError, match=r"samples: the checkpoint's processor can't take samples 0 to 1 \("):
        batches_of(florence, set_of(_shown(0, 1), Sample((), "what", "blue")))


@pytest.mark.parametrize("family", CHATS, ids=lambda f: f.name)
def test_chats_keep_their_turns(family: Family) -> None:
    image = picture(1, 24, 24)
    messages = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is there"}]},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": [{"type": "text", "text": "what color"}]},
    )
    samples = set_of(Sample((image,), None, "red", messages=messages), _shown(1, 1))
    (batch,) = batches_of(family, samples)
    assert family.processor is not None
    words: Any = tokenizer_of(family.processor())
    real = batch["input_ids"][0][batch["attention_mask"][0] == 1]
    read = words.decode(real, skip_special_tokens=True)
    for earlier, later in (("what shape is there", "a star"), ("a star", "what color"), ("what color", "red")):
        assert read.index(earlier) < read.index(later)
    labels = batch["labels"][0]
    assert words.decode(labels[labels != -100], skip_special_tokens=True).split() == ["red"]


@every_family
def test_an_answer_does_not_depend_on_its_neighbours(family: Family) -> None:
    assert family.processor is not None
    prompter = Prompter(model_of(family), family.processor())
    samples = list(vlm.samples(3, padding=True, seed=5).samples)
    together = generate(model_of(family), prompter, samples, new_tokens=6, min_tokens=5)
    assert together == [generate(model_of(family), prompter, [s], new_tokens=6, min_tokens=5)[0] for s in samples]
    assert any(together) or family.name in SILENT
