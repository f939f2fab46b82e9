"""Greedy text of a generating model for a batch of samples, the prompt cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.models import is_encoder_decoder, to_device
from ecoflap.calibration.prompts import Prompter, image_processor_of
from ecoflap.calibration.sample import Sample
from ecoflap.errors import CalibrationError


@torch.no_grad()
def generate(
    model: nn.Module, prompter: Prompter, samples: Sequence[Sample], *, new_tokens: int, limit: int | None = None
) -> list[str]:
    """What ``model`` says to each sample's prompt and pictures, greedily.

    Args:
        prompter: for this model and its processor; pictures are left out for a model that cannot see.
        new_tokens: most tokens of an answer.
        limit: most tokens of a prompt, images included; None for no limit.

    Raises:
        CalibrationError: a prompt is longer than ``limit``.
    """
    if image_processor_of(prompter.processor) is None:
        samples = [replace(sample, images=()) for sample in samples]
    texts = [prompter.render(sample) for sample in samples]
    # A decoder continues its prompt, so that must end where the answer begins: padding goes to the left.
    side = "right" if is_encoder_decoder(model) else "left"
    inputs = to_device(prompter.encode(texts, [sample.images for sample in samples], side), model)
    ids = inputs["input_ids"]
    if limit is not None and ids.shape[1] > limit:
        raise CalibrationError(
            f"a prompt has {ids.shape[1]} tokens, more than the sequence length of {limit}: raise it"
        )
    inputs.pop("token_type_ids", None)
    assert prompter.tokenizer is not None
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    settings, end = getattr(model, "generation_config", None), prompter.tokenizer.eos_token_id
    if getattr(settings, "eos_token_id", None) is None and end is not None:
        options["eos_token_id"] = end
    pad = end if prompter.tokenizer.pad_token_id is None else prompter.tokenizer.pad_token_id
    if pad is not None:  # finished answers are filled up with a token that decoding drops
        options["pad_token_id"] = pad
    output = model.generate(**inputs, **options)  # type: ignore[operator]
    length = ids.shape[1]
    if output.shape[1] >= length and torch.equal(output[:, :length], ids):  # decoders repeat the prompt
        output = output[:, length:]
    return [text.strip() for text in prompter.tokenizer.batch_decode(output, skip_special_tokens=True)]
