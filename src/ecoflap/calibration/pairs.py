"""Texts, and pictures with texts, for models that encode both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.models import max_length
from ecoflap.calibration.prompts import padding_token, tokenizer_of
from ecoflap.calibration.sample import Sample


def encode_pairs(
    samples: Sequence[Sample], texts: Sequence[str], model: nn.Module, processor: Any
) -> dict[str, torch.Tensor]:
    """The first picture of each sample with its text: ``pixel_values`` and ``input_ids``, ``[B, ...]`` each."""
    with padding_token(tokenizer_of(processor)):
        encoded = processor(
            images=[sample.image for sample in samples],
            text=list(texts),
            return_tensors="pt",
            **text_options(model, processor),
        )
    return _tensors(encoded)


def encode_texts(texts: Sequence[str], model: nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    """Texts alone, as :func:`encode_pairs` encodes them."""
    with padding_token(tokenizer_of(processor)):
        return _tensors(processor(text=list(texts), return_tensors="pt", **text_options(model, processor)))


def text_options(model: nn.Module, processor: Any) -> dict[str, Any]:
    """How texts are padded and cut for ``model``.

    Most texts are padded to the longest of the batch. Some models have learnt on texts of one length, padding
    included, and read the summary of a text off its last token (SigLIP): then the processor says so itself, or the
    tokenizer makes no attention mask, or the model has the bias of the sigmoid loss.
    """
    tokenizer = tokenizer_of(processor)
    known = int(getattr(tokenizer, "model_max_length", 0) or 0)
    limits = [n for n in (max_length(model), known if 0 < known < 10**6 else None) if n]  # 1e30 says "no limit"
    limit = min(limits, default=None)
    own = getattr(processor, "text_kwargs", None) or {}
    if "padding" in own:  # the processor pads and cuts as its model has learnt it
        return {} if limit is None or own.get("max_length", limit) <= limit else {"max_length": limit}
    fixed = "attention_mask" not in getattr(tokenizer, "model_input_names", ("attention_mask",))
    fixed = fixed or isinstance(getattr(model, "logit_bias", None), torch.Tensor)
    padding: bool | str = "max_length" if fixed and limit is not None else True
    if limit is None or getattr(processor, "num_query_tokens", 0) is None:  # BLIP-2's can't cut without its queries
        return {"padding": padding}
    return {"padding": padding, "truncation": True, "max_length": limit}


def _tensors(encoded: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in dict(encoded).items() if isinstance(value, torch.Tensor)}
