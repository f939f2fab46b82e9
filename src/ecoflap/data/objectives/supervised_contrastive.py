"""A loss for backbones without a head: features of samples of one class should be closer than those of others.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ecoflap.data.encode import class_number, label_of, numbers_by_name, sentence_of, text_options
from ecoflap.data.model_facts import Batch, takes_images
from ecoflap.data.prompts import image_processor_of, padding_token, tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError

TEMPERATURE = 0.1  # of the paper


def supervised_contrastive(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the samples i that share their class with another of −1/|P(i)| Σ_{p ∈ P(i)} log softmax_p(z_i·z / τ).

    P(i) are the other samples of i's class, the softmax is over all samples but i, z are the normalised features.

    Args:
        model: gives ``last_hidden_state`` and, for images, ``pooler_output`` if it has one.
        batch: inputs, and class numbers ``labels`` ``[B]``.

    Raises:
        CalibrationError: there are no classes, or no two samples of one class.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise CalibrationError("the batch has no labels, so there is no contrast of classes: give a class column")
    same_class = labels[:, None] == labels[None, :]
    same_class.fill_diagonal_(False)
    if not bool(same_class.any()):
        raise CalibrationError(
            f"no two of the {len(labels)} samples of a batch are of one class: raise the batch size, or give more data "
            "of each class"
        )
    features = normalize(pooled(model(**inputs), inputs).float(), dim=-1)
    cosines = features @ features.t() / TEMPERATURE
    cosines = cosines.masked_fill(torch.eye(len(labels), dtype=torch.bool, device=cosines.device), -torch.inf)
    logs = cosines.log_softmax(dim=-1).masked_fill(~same_class, 0.0)
    counts = same_class.sum(dim=-1)
    return -(logs.sum(dim=-1) / counts.clamp(min=1)).sum() / (counts > 0).sum()


def pooled(output: Any, inputs: Batch) -> Tensor:
    """One vector per sample ``[B, D]``: for a text the mean over its tokens, for an image the model's pooled output, or
    the mean over its positions."""
    state: Tensor = output.last_hidden_state
    if "input_ids" in inputs:
        return mean_over_tokens(state, inputs.get("attention_mask"))
    own = getattr(output, "pooler_output", None)
    if isinstance(own, Tensor):
        return own.flatten(1)
    return state.flatten(2).mean(dim=2) if state.ndim == 4 else state.mean(dim=1)


def mean_over_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean ``[B, D]`` of ``state`` ``[B, T, D]`` over the real tokens, those with ``mask`` ``[B, T]`` 1 (None: all)."""
    kept = torch.ones(state.shape[:2], device=state.device) if mask is None else mask
    weights = kept.to(state.dtype)[..., None]
    return (state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def encode_labelled(
    samples: Sequence[Sample], model: nn.Module, processor: Any, source: str, classes: Sequence[str]
) -> dict[str, Any]:
    """Images, or texts for a text model, with their class numbers.

    Raises:
        CalibrationError: a sample has no class, or no input for the model.
    """
    numbers = numbers_by_name(classes)
    reads = not takes_images(model)
    labels = [sample.label if reads else label_of(sample) for sample in samples]
    chosen = [class_number(label or "", numbers, source, "given") for label in labels]
    if not reads:
        images = [sample.image for sample in samples]
        image_processor: Any = image_processor_of(processor)
        if image_processor is None or any(image is None for image in images):
            raise CalibrationError(f"{source} has no images, but {type(model).__name__} needs them")
        return {**dict(image_processor(images=images, return_tensors="pt")), "labels": torch.tensor(chosen)}
    texts, tokenizer = [sentence_of(sample) for sample in samples], tokenizer_of(processor)
    if tokenizer is None or any(text is None for text in texts):
        raise CalibrationError(f"{source} has no text, but {type(model).__name__} needs one")
    with padding_token(tokenizer):
        encoded = tokenizer(texts, return_tensors="pt", **text_options(model, processor))
    return {**dict(encoded), "labels": torch.tensor(chosen)}
