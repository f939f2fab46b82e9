"""Chooses the function that makes batches for objectives that need more than a text and its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ecoflap.data.encode import (
    answers_by_decoder,
    class_number,
    encode_answers,
    encode_classified,
    encode_pairs,
    label_of,
    numbers_by_name,
)
from ecoflap.data.objectives import objective_name
from ecoflap.data.objectives.matching import with_negatives
from ecoflap.data.objectives.supervised_contrastive import encode_labelled
from ecoflap.data.objectives.zero_shot import DEFAULT_TEMPLATES, fill, prompt_tensors
from ecoflap.data.prompts import image_processor_of, tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleSet
from ecoflap.errors import CalibrationError

Collate = Callable[[list[Sample], int], dict[str, Any]]  # (samples, number of the first one) -> tensors
BY_ROW = ("classification", "supervised-contrastive")  # one row per sample with its class, also for texts
PAIRED = ("contrastive", "itm-itc")  # objectives that compare the samples of a batch with one another


def collating_objective(name: str | None, model: nn.Module) -> str:
    """The objective that decides the content of a batch: for a user's own function, the model's default."""
    return objective_name(None if name is not None and ":" in name else name, model)


def unpacked(sample_set: SampleSet, name: str, processor: Any) -> SampleSet:
    """The samples for objective ``name``: texts are packed into windows, but not for classifiers of texts.

    Raises:
        CalibrationError: there are fewer rows than samples were asked for.
    """
    return sample_set.by_row() if name in BY_ROW and tokenizer_of(processor) is not None else sample_set


def objective_collator(
    name: str,
    samples: Sequence[Sample],
    model: nn.Module,
    processor: Any,
    source: str,
    *,
    classes: Sequence[str] | None = None,
    own_classes: Sequence[str] | None = None,
    class_prompts: Sequence[str] | None = None,
) -> Collate | None:
    """The function that makes the batches of objective ``name``; None if they are those of a language model.

    Args:
        classes: names of the classes; by default ``own_classes``, or else the samples' distinct labels, sorted.
        own_classes: the data set's own names of its classes, in the order of their numbers.
        class_prompts: templates with ``{}`` for the class name.

    Raises:
        CalibrationError: the samples lack images, texts or classes.
        InvalidOption: a template without ``{}``.
    """
    if name == "classification":
        return lambda part, start: encode_classified(part, model, processor, source, own_classes)
    if name == "supervised-contrastive":
        given = classes or own_classes or sorted({label for label in map(label_of, samples) if label is not None})
        return lambda part, start: encode_labelled(part, model, processor, source, given)
    if answers_by_decoder(model):
        return lambda part, start: encode_answers(part, model, processor, source)
    if name not in (*PAIRED, "zero-shot"):
        return None
    if image_processor_of(processor) is None or tokenizer_of(processor) is None:
        raise CalibrationError(f"objective '{name}' needs a processor with both an image processor and a tokenizer")
    if any(sample.image is None for sample in samples):
        raise CalibrationError(f"{source} has no images, but objective '{name}' needs them: give an image column")
    templates = tuple(class_prompts or DEFAULT_TEMPLATES)
    if name == "zero-shot":
        return _zero_shot(samples, model, processor, source, classes, own_classes, templates)
    same_number = classes is not None and own_classes is not None and len(classes) == len(own_classes)
    names = dict(zip(own_classes or (), classes or (), strict=True)) if same_number else {}
    return lambda part, start: _paired(name, part, model, processor, source, templates[0], names)


def _zero_shot(
    samples: Sequence[Sample],
    model: nn.Module,
    processor: Any,
    source: str,
    classes: Sequence[str] | None,
    own_classes: Sequence[str] | None,
    templates: Sequence[str],
) -> Collate:
    labels = [label_of(sample) or "" for sample in samples]
    if not all(labels):
        raise CalibrationError(f"{source} has no class column, but objective 'zero-shot' needs one")
    own = tuple(own_classes or sorted(set(labels)))
    names = tuple(classes or own)
    # Class names for the prompts ("tench") replace the data set's own ("n01440764") with the same number.
    numbers = numbers_by_name(names) | (numbers_by_name(own) if len(own) == len(names) and own_classes else {})
    prompts = prompt_tensors(names, templates, model, processor)

    def collate(part: list[Sample], start: int) -> dict[str, Any]:
        encoded = dict(processor(images=[sample.image for sample in part], return_tensors="pt"))
        chosen = [class_number(label_of(sample) or "", numbers, source, "given") for sample in part]
        return {**encoded, **prompts, "labels": torch.tensor(chosen)}

    return collate


def _paired(
    name: str,
    samples: Sequence[Sample],
    model: nn.Module,
    processor: Any,
    source: str,
    template: str,
    names: Mapping[str, str],
) -> dict[str, Any]:
    texts = [_text_of(sample, template, names) for sample in samples]
    known = [text for text in texts if text is not None]
    if len(known) != len(texts):
        raise CalibrationError(
            f"{source} has no answers or captions, but {type(model).__name__} needs text for its loss"
        )
    encoded = encode_pairs(samples, known, model, processor)
    if name == "itm-itc":
        shown = [replace(sample, text=text) for sample, text in zip(samples, known, strict=True)]
        return with_negatives(model, encoded, shown)
    return encoded


def _text_of(sample: Sample, template: str, names: Mapping[str, str]) -> str | None:
    """The caption, or the prompt of the class if the samples have no other text.

    ``names`` are names for prompts ("tench") by the data set's own class names ("n01440764").
    """
    if sample.label is not None and sample.text in (None, sample.label):
        return fill(template, names.get(sample.label, sample.label))
    return sample.text
