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
        images: its images in RGB; none for a text, two for NLVR2.
        prompt: the text for the model beside the images, before a chat template is applied.
        text: the target (answer, caption, the last turn of a chat), or plain text to be packed.
        question: the question without the prompt's other words.
        answers: answers of several annotators (VQAv2).
        kind: group of the sample, for results by group.
        captions: all captions of the image (COCO, Flickr30k); ``text`` is the first of them.
        label: name of the image's class.
        choices: the options of a multiple-choice question; ``text`` is the right one.
        messages: turns of a chat before ``text``, in transformers' format: ``{"role": ..., "content": [{"type":
            "image"}, {"type": "text", "text": ...}]}``; ``images`` has their images in the same order.
        group: number that the samples of one image share (retrieval); None if samples are independent.
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
        """The first image; None if there is none."""
        return self.images[0] if self.images else None
