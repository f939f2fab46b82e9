"""Image classification: top-1 and top-5 accuracy of a model with a classification head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ecoflap.data.encode import numbers_by_name
from ecoflap.data.model_facts import parameters_of, to_device
from ecoflap.errors import InvalidOption
from ecoflap.evaluation.classes import TopClasses, labels_of
from ecoflap.evaluation.task import (
    Chunk,
    Task,
    TaskResult,
    TestData,
    Unit,
    common_settings,
    image_inputs,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating

TASK = "image-classification"


@dataclass(frozen=True)
class ImageClassification(Task):
    """Accuracy of the class with the highest logit, and of the five highest.

    A label is the name (``config.label2id``) or number of one of the model's classes. If the data set has as many
    classes as the model, but no common name, its order counts, and ``settings["labels"]`` is "by order".

    Data: images with a class each. Classes: the data's labels in the order of the model's classes, instead of the
    model's names. The sequence length has no effect.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "image-classification"
    takes: ClassVar[tuple[str, ...]] = ("columns", "image_folder", "classes")
    needs_pictures: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model has no classes, or another number of classes than ``classes``.
            CalibrationError: there are no images, or a label is none of the model's classes.
            NonFiniteLoss: a logit is NaN or infinite.
        """
        classes = test.classes
        names = model_classes(model)
        if not names or "pixel_values" not in parameters_of(model) or "input_ids" in parameters_of(model):
            raise InvalidOption(f"task '{TASK}' needs a model that classifies images, not {type(model).__name__}")
        if classes is not None and len(classes) != len(names):
            raise InvalidOption(f"{len(classes)} classes are given, but {type(model).__name__} has {len(names)}")
        reader = open_data(TASK, test)
        numbers, how = numbers_by_name(names), "by name"
        own = reader.classes or ()
        if classes is not None:
            numbers, how = numbers_by_name(classes), "as given"
        elif len(own) == len(names) and not numbers.keys() & numbers_by_name(own).keys():
            numbers, how = numbers_by_name(own), "by order"
        found = TopClasses(TASK, names)

        def labels(part: Chunk) -> torch.Tensor:
            return labels_of(part, numbers, TASK, reader.source, "model's")

        def logits(part: Chunk) -> torch.Tensor:
            inputs = image_inputs(processor, pictures(part, TASK, reader.source), TASK)
            scores: torch.Tensor = model(**to_device(inputs, model)).logits
            return scores.float().cpu()

        with evaluating(model):
            found.classify(reader, test, labels, logits)
        return found.result(common_settings(reader, test, labels=how))


def model_classes(model: nn.Module) -> tuple[str, ...]:
    """Names of a classifier's classes by their number; empty for a model without a head."""
    if "Classification" not in type(model).__name__:
        return ()
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names[number]) for number in sorted(names))
