"""Zero-shot classification: an image belongs to the class whose averaged prompts are nearest to it.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021, section
3.1: the embedding of a class is the mean of its normalised prompts, normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ecoflap.data.objectives.zero_shot import DEFAULT_TEMPLATES, fill
from ecoflap.evaluation.classes import TopClasses, check_classes, labels_of, numbers_of, own_classes
from ecoflap.evaluation.embeddings import Matcher, TwoTowers, embedder_of, similarity
from ecoflap.evaluation.task import (
    Chunk,
    Task,
    TaskResult,
    TestData,
    Unit,
    check_finite,
    common_settings,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.progress import Progress, Silent


@dataclass(frozen=True)
class ZeroShot(Task):
    """Top-1 and top-5 accuracy of CLIP, SigLIP, or a retrieval model's embeddings (BLIP, BLIP-2).

    Data: images with a class each. The sequence length has no effect; prompts are cut to the text tower's limit.
    Classes: names for the prompts, in the order of the data set's own classes or equal to its labels; None for the data
    set's own: its folders, the names of its class column, or the distinct labels of all rows, sorted. Class prompts:
    templates with ``{}`` for the name; default "a photo of a {}."
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "zero-shot-image-classification"
    takes: ClassVar[tuple[str, ...]] = ("columns", "image_folder", "classes", "class_prompts")
    needs_pictures: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model does not compare images with texts, a template has no ``{}``, or there are less
                than 2 classes.
            CalibrationError: there are no images, or a label is none of the classes.
            NonFiniteLoss: an embedding is NaN or infinite.
        """
        embedder = embedder_of(model, processor, "zero-shot")
        reader = open_data("zero-shot", test)
        assert test.data is not None
        own = (reader.classes or ()) if test.classes else own_classes(reader, test.data)
        names, templates = tuple(test.classes or own), tuple(test.class_prompts or DEFAULT_TEMPLATES)
        check_classes(names, "zero-shot", reader.source)
        numbers = numbers_of(names, own)
        found = TopClasses("zero-shot", names)

        def labels(part: Chunk) -> Tensor:
            return labels_of(part, numbers, "zero-shot", reader.source)

        def scores(part: Chunk) -> Tensor:
            return similarity(embedder.pictures(pictures(part, "zero-shot", reader.source)), prompts)

        with evaluating(model):
            prompts = class_embeddings(embedder, names, templates, test.batch_size, test.progress)
            check_finite(prompts, "the embedding of a class", reader.source)
            found.classify(reader, test, labels, scores)
        return found.result(common_settings(reader, test, class_prompts=list(templates)))


def class_embeddings(
    embedder: TwoTowers | Matcher,
    names: Sequence[str],
    templates: Sequence[str],
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """One normalised row per class, ``[C, D]``: the mean of its normalised prompts."""
    prompts = [fill(template, name) for name in names for template in templates]
    rows = []
    with (progress or Silent()).stage("zero-shot, prompts", total=len(prompts)) as task:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            rows.append(embedder.texts(batch))
            task.advance(len(batch))
    return normalize(torch.cat(rows).view(len(names), len(templates), -1).mean(dim=1), dim=-1)
