"""Vision-language families at pico size, fed by their own processors: pictures of several sizes, padded texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import picos
import torch
from families import vlm_models as models
from families import vlm_more as more
from families.family import Batches, Family
from families.vlm_words import picture
from torch import nn

from ecoflap.data import Sample, SampleSet, make_batches

SIZES = ((16, 16), (40, 16), (16, 33), (24, 24))  # width, height: square, broad, tall, larger
QUESTIONS = (("what color is the big circle ?", "blue and red"), ("how many ?", "two"),
             ("is there a cat on the left", "no"), ("what shape", "a star above the square"))  # fmt: skip
EVEN = (("what color is the circle ?", "red"), ("what shape is the tree ?", "star"), ("how big is the dog ?", "two"),
        ("is there a cat left ?", "no"))  # fmt: skip


def samples(n: int, padding: bool, seed: int) -> SampleSet:
    """Questions about pictures; with ``padding`` of different lengths and sizes, else all alike."""
    found = []
    for number in range(n):
        question, answer = (QUESTIONS if padding else EVEN)[number % 4]
        size = SIZES[number % 4] if padding else (32, 16)
        image = picture(100 * seed + number, *size)
        found.append(Sample((image,), f"Question: {question} Short answer:", answer, question))
    return SampleSet(tuple(found), tuple(range(n)), 0, "questions", {})


def build(make: Callable[[], models.Parts], seed: int = 0) -> nn.Module:
    parts = models.parts(make)
    return picos.scramble(parts.model(copy.deepcopy(parts.config)), seed)


def batches(
    make: Callable[[], models.Parts], n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0
) -> Batches:
    parts = models.parts(make)
    with torch.device("meta"):
        model = parts.model(copy.deepcopy(parts.config))
    return make_batches(samples(n, padding, seed), model, parts.processor, batch_size=batch_size)


def _family(make: Callable[[], models.Parts], towers: Sequence[tuple[str, int]]) -> Family:
    processor: Callable[[], Any] = lambda: models.parts(make).processor  # noqa: E731
    return Family(make.__name__, partial(build, make), partial(batches, make), tuple(towers), processor)


_SEE, _SAY = ("vision", 3), ("language", 2)
FAMILIES: tuple[Family, ...] = (
    _family(models.llava, [_SEE, _SAY]),
    _family(models.llava_next, [_SEE, _SAY]),
    _family(models.llava_onevision, [_SEE, _SAY]),
    _family(models.qwen2_vl, [_SEE, _SAY]),
    _family(models.qwen2_5_vl, [_SEE, _SAY]),
    _family(models.qwen3_vl, [_SEE, _SAY]),
    _family(models.idefics3, [_SEE, _SAY]),
    _family(models.smolvlm, [_SEE, _SAY]),
    _family(models.paligemma, [_SEE, _SAY]),
    _family(models.gemma3, [_SEE, ("language", 3)]),
    _family(models.internvl, [_SEE, _SAY]),
    _family(models.mllama, [("vision", 2), ("vision", 1), ("language", 3)]),
    _family(models.florence2, [("vision", 1), ("vision", 2), _SAY, _SAY]),  # two stages
    _family(models.kosmos2, [_SEE, _SAY]),
    _family(more.idefics2, [_SEE, _SAY]),
    Family("mistral3", partial(build, more.mistral3), more.mistral3_batches, (_SEE, _SAY)),
    _family(more.glm4v, [_SEE, _SAY]),
    _family(more.aya_vision, [_SEE, _SAY]),
    _family(more.ovis2, [_SEE, _SAY]),
)
