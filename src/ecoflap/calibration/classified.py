"""Classes: from a label to its number, and batches for classifiers of pictures, texts, and pictures with a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.models import parameters_of
from ecoflap.calibration.pairs import text_options
from ecoflap.calibration.prompts import image_processor_of, padding_token, tokenizer_of
from ecoflap.calibration.sample import Sample
from ecoflap.errors import CalibrationError


def class_number(label: str, classes: Mapping[str, int], source: str, whose: str = "model's") -> int:
    """The number of a class given by its name (in any case) or number.

    Args:
        classes: names in lower case to numbers; empty where names are not known.
        whose: who numbers the classes, for the message.

    Raises:
        CalibrationError: it is none of the classes.
    """
    key = label.strip().lower()
    if key in classes:
        return classes[key]
    if key.isdigit() and (not classes or int(key) <= max(classes.values())):
        return int(key)
    shown = label if len(label) <= 40 else f"{label[:40]}..."
    few = ", ".join(list(classes)[:5]) + (", ..." if len(classes) > 5 else "")
    raise CalibrationError(
        f"{source}: label '{shown}' is none of the {whose} {len(classes)} classes ({few or 'unnamed'}): is it the "
        "column of classes?"
    )


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Names in lower case to their numbers; the first of two equal ones counts."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name.strip().lower(), number)
    return numbers


def label_of(sample: Sample) -> str | None:
    """The class of a sample without other text: its label, or else its text."""
    return sample.label if sample.label is not None else sample.text


def sentence_of(sample: Sample) -> str | None:
    """What a classifier is to read of a sample whose class is its label."""
    return next((text for text in (sample.question, sample.prompt, sample.text) if text is not None), None)


def encode_classified(
    samples: Sequence[Sample], model: nn.Module, processor: Any, source: str, own_classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """A batch of a classifier.

    Which inputs it has follows from the forward's arguments and the processor: ``pixel_values`` ``[B, ...]`` of a
    picture, ``[B, N, ...]`` of N pictures (NLVR2), ``input_ids`` of a text, or both; ``labels`` ``[B]`` are class
    numbers, left out where the samples have no class. Where the data names as many classes as the model,
    but none alike ("LABEL_0"), the order of ``own_classes`` counts.

    Raises:
        CalibrationError: a sample lacks a picture or text, or its label is none of the model's classes.
    """
    arguments = parameters_of(model)
    encoded: dict[str, Any] = {}
    reads = "input_ids" in arguments and tokenizer_of(processor) is not None
    if "pixel_values" in arguments and image_processor_of(processor) is not None:
        encoded |= _pictures(samples, model, processor, source)
    if reads:
        encoded |= _sentences(samples, model, processor, source)
    labels = [sample.label if reads else label_of(sample) for sample in samples]
    if any(label is not None for label in labels):
        names = getattr(getattr(model, "config", None), "label2id", None) or {}
        numbers = {str(name).lower(): int(number) for name, number in names.items()}
        own = numbered(own_classes or ())
        if len(own_classes or ()) == len(numbers) and not own.keys() & numbers.keys():
            numbers = own
        encoded["labels"] = torch.tensor([class_number(label or "", numbers, source) for label in labels])
    elif reads:
        raise CalibrationError(f"{source} has no class column, but {type(model).__name__} needs a class for its loss")
    return encoded


def _pictures(samples: Sequence[Sample], model: nn.Module, processor: Any, source: str) -> dict[str, Any]:
    wanted = getattr(getattr(model, "config", None), "num_images", None)
    several = isinstance(wanted, int)
    count = wanted if isinstance(wanted, int) else 1
    for sample in samples:
        if len(sample.images) < count or (several and len(sample.images) != count):
            raise CalibrationError(
                f"{type(model).__name__} needs {count} image{'s' if count > 1 else ''} with every sample, but one of "
                f"{source} has {len(sample.images)}"
            )
    pictures = [picture for sample in samples for picture in sample.images[:count]]
    image_processor: Any = image_processor_of(processor)
    encoded = dict(image_processor(images=pictures, return_tensors="pt"))
    if not several:
        return encoded
    return {
        name: value.view(-1, count, *value.shape[1:])
        for name, value in encoded.items()
        if isinstance(value, torch.Tensor)
    }


def _sentences(samples: Sequence[Sample], model: nn.Module, processor: Any, source: str) -> dict[str, Any]:
    texts = [sentence_of(sample) for sample in samples]
    if any(text is None for text in texts):
        raise CalibrationError(f"{source}: a sample has no text, but {type(model).__name__} needs one")
    tokenizer: Any = tokenizer_of(processor)
    with padding_token(tokenizer):
        return dict(tokenizer(texts, return_tensors="pt", **text_options(model, processor)))
