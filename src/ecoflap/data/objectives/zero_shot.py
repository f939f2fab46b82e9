"""Zero-shot classification as a loss: images against prompts of all classes, tokenised once for all batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ecoflap.data.encode import encode_texts
from ecoflap.data.model_facts import Batch
from ecoflap.data.objectives.matching import TEMPERATURE
from ecoflap.errors import CalibrationError, InvalidOption

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# The factor between cosine and logit in two-tower models: parameter name, and the function that gives the factor.
SCALES: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
    ("logit_scale", torch.exp),
    ("temperature", torch.reciprocal),
)


def fill(template: str, name: str) -> str:
    """The prompt of one class.

    Raises:
        InvalidOption: the template has no ``{}``.
    """
    if "{}" not in template:
        raise InvalidOption(f"class prompt '{template}' has no {{}} where the name of the class goes")
    return template.replace("{}", name)


def prompt_tensors(
    classes: Sequence[str], templates: Sequence[str], model: nn.Module, processor: Any
) -> dict[str, torch.Tensor]:
    """Tokens of every class in every template, to be shared by all batches.

    Returns:
        ``input_ids``, ``attention_mask`` (where the tokenizer gives one) of C·T prompts ``[C·T, L]``, all templates of
        the first class first; ``class_prompts``, the number T of templates.

    Raises:
        InvalidOption: less than two classes, no template, or one without ``{}``.
    """
    if len(classes) < 2 or not templates:
        raise InvalidOption(
            f"zero-shot classification needs two classes and a template at least, not {len(classes)} and "
            f"{len(templates)}: give classes and class_prompts"
        )
    texts = [fill(template, name) for name in classes for template in templates]
    return {**encode_texts(texts, model, processor), "class_prompts": torch.tensor(len(templates))}


def zero_shot(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of images over classes (CLIP, arXiv 2103.00020, section 3.1).

    The logit of a class is the model's scale times the cosine of the image with the mean of the class's normalised
    prompts. A constant bias (SigLIP) has no effect.

    Args:
        batch: ``pixel_values`` of B images, the result of :func:`prompt_tensors`, ``labels`` ``[B]``.
    """
    if batch.get("class_prompts") is None or batch.get("labels") is None:
        raise CalibrationError("the batch has no class prompts and labels: make it with objective='zero-shot'")
    inputs = {name: value for name, value in batch.items() if name not in ("class_prompts", "labels")}
    output = model(**inputs)
    pictures: Any = getattr(output, "image_embeds", None)
    prompts: Any = getattr(output, "text_embeds", None)
    if not (_is_matrix(pictures) and _is_matrix(prompts)):
        raise CalibrationError(
            f"objective 'zero-shot': {type(model).__name__} gives no image_embeds and text_embeds, one per image and "
            "one per text: it needs a model with two towers, such as CLIP"
        )
    templates = int(batch["class_prompts"])
    normal = functional.normalize(prompts.float(), dim=-1).view(-1, templates, prompts.shape[-1])
    classes = functional.normalize(normal.mean(dim=1), dim=-1)
    cosines = functional.normalize(pictures.float(), dim=-1) @ classes.t()
    return functional.cross_entropy(_scale(model) * cosines, batch["labels"])


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2


def _scale(model: nn.Module) -> torch.Tensor | float:
    """The model's own factor between cosine and logit, in fp32; one without any gets ``1 / TEMPERATURE``."""
    for name, factor in SCALES:
        parameter = getattr(model, name, None)
        if isinstance(parameter, torch.Tensor):
            return factor(parameter.float())
    return 1 / TEMPERATURE
