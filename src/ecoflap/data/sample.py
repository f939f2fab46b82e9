"""Defines one sample of calibration or test data, the same for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        images: its pictures in RGB, none for a text; two for NLVR2.
        prompt: the text for the model besides the pictures, before any chat template.
        text: what the model should say (answer, caption, the last turn of a chat), or plain text to be packed.
        question: the question alone, where ``prompt`` puts words around it.
        answers: what several annotators answered (VQAv2).
        kind: group of the sample, for results by group.
        captions: all captions of the picture (COCO, Flickr30k), ``text`` being the first of them.
        label: name of the class of the picture.
        choices: the options of a multiple-choice question, ``text`` being the right one.
        messages: turns of a chat before ``text``, in transformers' format: ``{"role": ..., "content": [{"type":
            "image"}, {"type": "text", "text": ...}]}``; their images stand in ``images`` in the same order.
        group: number that the samples of one picture share (retrieval); None where samples are independent.
    """

    images: tuple[Image.Image, ...] = ()
    prompt: str | None = None
    text: str | None = None
    question: str | None = None
    answers: tuple[str, ...] | None = None
    kind: str | None = None
    captions: tuple[str, ...] | None = None
    label: str | None = None
    choices: tuple[str, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    group: str | None = None

    @property
    def image(self) -> Image.Image | None:
        """The first picture, None without one."""
        return self.images[0] if self.images else None
