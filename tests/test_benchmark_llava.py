"""The benchmark's LLaVA: questions packed behind one picture are to the model what each is alone."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import picos
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("llava_train", "llava", "assets", "dinov2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import llava
    import llava_train

    monkeypatch.setattr(llava, "TOKENS", picos.PATCHES)
    return llava_train


def _pictures(trainer: ModuleType, count: int, width: int) -> list:
    draw = random.Random(5)
    found = []
    for _ in range(count):
        texts = [tuple(draw.randrange(6, 60) for _ in range(draw.randrange(3, 8))) for _ in range(draw.randrange(1, 5))]
        prompts = tuple(draw.randrange(1, len(text)) for text in texts)
        features = torch.randn(picos.PATCHES, width, generator=torch.Generator().manual_seed(len(found)))
        found.append(trainer.Picture(features, tuple(texts), prompts))
    return found


@torch.no_grad()
def test_packed_questions_are_as_alone(trainer: ModuleType) -> None:
    model = picos.llava()
    width = model.model.multi_modal_projector.linear_1.in_features
    pictures = _pictures(trainer, 3, width)
    projector = trainer.Projector(model, torch.randn(width), torch.rand(width) + 0.5)
    logits, targets, where = trainer.answers(model, projector, trainer.pack(pictures))
    at = 0
    for row, picture in enumerate(pictures):
        shown = projector(picture.features)[None]
        for number, (text, prompt) in enumerate(zip(picture.texts, picture.prompts, strict=True)):
            inputs = torch.cat([shown, model.model.language_model.embed_tokens(torch.tensor([text]))], dim=1)
            alone = model.lm_head(model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state)[
                0
            ]
            wanted = alone[picos.PATCHES + prompt - 1 : picos.PATCHES + len(text) - 1]
            n = len(wanted)
            torch.testing.assert_close(logits[at : at + n], wanted, rtol=1e-4, atol=1e-4)
            assert targets[at : at + n].tolist() == list(text[prompt:])
            assert where[at : at + n].tolist() == [[row, number]] * n
            at += n
    assert at == len(logits)


@torch.no_grad()
def test_folded_projector_takes_raw_features(trainer: ModuleType) -> None:
    model = picos.llava()
    inner = model.model.multi_modal_projector
    features = 3 * torch.randn(picos.PATCHES, inner.linear_1.in_features) + 1
    projector = trainer.Projector(model, features.mean(0), features.std(0))
    wanted, folded = projector(features), projector.folded()  # before the model's own layers, which it uses, change
    inner.load_state_dict({name: value.float() for name, value in folded.items()})
    got = inner(features)
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()  # bfloat16 keeps 8 bits
    other = trainer.Projector(picos.llava(), features.mean(0), features.std(0))
    other.unfold(folded)
    torch.testing.assert_close(other(features), got, rtol=1e-3, atol=1e-4)


def test_every_picture_comes_once_before_any_comes_again(trainer: ModuleType) -> None:
    pictures = _pictures(trainer, 6, 4)
    source = trainer.stream(pictures, 2, seed=3)
    for _ in range(2):
        drawn = [id(picture) for _ in range(3) for picture in next(source)]
        assert sorted(drawn) == sorted(map(id, pictures))
