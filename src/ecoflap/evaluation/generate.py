"""Generates text for a batch of samples, greedily or by beam search, and cuts off the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ecoflap.data.encode import answers_by_decoder
from ecoflap.data.model_facts import is_encoder_decoder, to_device
from ecoflap.data.prompts import Prompter, image_processor_of
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError
from ecoflap.support.ranges import check_count

MOST_BEAMS = 1000  # each is a row of the batch


@torch.no_grad()
def generate(
    model: nn.Module,
    prompter: Prompter,
    samples: Sequence[Sample],
    *,
    new_tokens: int,
    limit: int | None = None,
    beams: int = 1,
    min_tokens: int = 0,
    length_penalty: float = 1.0,
) -> list[str]:
    """The model's output for each sample's prompt and images.

    Args:
        prompter: for this model and its processor; images are left out for a text model.
        new_tokens: most tokens of an answer.
        limit: most tokens of a prompt, images included; None for no limit.
        beams: width of the beam search; 1 is greedy.
        min_tokens: fewest tokens of an answer.
        length_penalty: exponent of the length that divides a beam's log-likelihood; below 0 prefers short answers.

    Raises:
        InvalidOption: a number out of its range.
        CalibrationError: a prompt is longer than ``limit``, or there is no tokenizer.
    """
    check_count("new_tokens", new_tokens)
    check_count("beams", beams, most=MOST_BEAMS)
    check_count("min_tokens", min_tokens, least=0, most=new_tokens)
    if prompter.tokenizer is None:
        raise CalibrationError(f"{type(model).__name__} comes without a tokenizer that can be read: texts need one")
    if image_processor_of(prompter.processor) is None:
        samples = [replace(sample, images=()) for sample in samples]
    texts = [prompter.render(sample) for sample in samples]
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": beams}
    options |= {"min_new_tokens": min_tokens} if min_tokens else {}
    options |= {"length_penalty": length_penalty} if beams > 1 else {}
    said = [""] * len(samples)
    for rows in _padded_alike(model, prompter, texts):
        inputs = _inputs(model, prompter, [texts[i] for i in rows], [samples[i] for i in rows], limit)
        for row, text in zip(rows, _continue(model, prompter, inputs, options), strict=True):
            said[row] = text
    return said


def delegates_generation(model: nn.Module) -> bool:
    """Whether ``generate`` calls the model's own text decoder, with its own end and padding tokens (BLIP).

    These models have absolute positions and ignore the prompt's mask, so that padding would change their output.
    """
    return callable(getattr(getattr(model, "text_decoder", None), "generate", None))


def _padded_alike(model: nn.Module, prompter: Prompter, texts: Sequence[str]) -> Iterator[list[int]]:
    """Rows of each batch: all together, or those of equal length if the model does not mask padding."""
    if not delegates_generation(model):
        yield list(range(len(texts)))
        return
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        by_length.setdefault(len(prompter.token_ids(text)), []).append(row)
    yield from by_length.values()


def _inputs(
    model: nn.Module, prompter: Prompter, texts: Sequence[str], samples: Sequence[Sample], limit: int | None
) -> dict[str, Any]:
    # A decoder continues its prompt, so padding goes to the left.
    side = "right" if is_encoder_decoder(model) else "left"
    inputs: dict[str, Any] = to_device(prompter.encode(texts, [sample.images for sample in samples], side), model)
    length = inputs["input_ids"].shape[1]
    if limit is not None and length > limit:
        raise CalibrationError(f"a prompt has {length} tokens, more than the sequence length of {limit}: raise it")
    return inputs


def _continue(model: nn.Module, prompter: Prompter, inputs: dict[str, Any], options: dict[str, Any]) -> list[str]:
    ids, tokenizer = inputs["input_ids"].clone(), prompter.tokenizer  # BLIP writes into its input ids
    assert tokenizer is not None
    length = ids.shape[1]
    if delegates_generation(model):
        output = model.generate(**inputs, **options)  # type: ignore[operator]
        # A continuing decoder began with the prompt, the first token replaced and the last left out.
        if not answers_by_decoder(model):
            output = output[:, length - 1 :]
    else:
        output = model.generate(**inputs, **options, **_end_tokens(model, tokenizer))  # type: ignore[operator]
        if output.shape[1] >= length and torch.equal(output[:, :length], ids):  # decoders repeat the prompt
            output = output[:, length:]
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def _end_tokens(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """End and padding tokens, if the model's generation config has none."""
    options: dict[str, Any] = {}
    settings, end = getattr(model, "generation_config", None), tokenizer.eos_token_id
    if getattr(settings, "eos_token_id", None) is None and end is not None:
        options["eos_token_id"] = end
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is not None:  # finished answers are padded with a token that decoding drops
        options["pad_token_id"] = pad
    return options
