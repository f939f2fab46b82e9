"""What a generating model should say, as labels: the answer in a decoder's own text, or an encoder-decoder's target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ecoflap.calibration.padding import IGNORED
from ecoflap.calibration.prompts import Prompter
from ecoflap.calibration.sample import Sample
from ecoflap.errors import CalibrationError


def encode_targets(samples: Sequence[Sample], prompter: Prompter, start: int, seed: int) -> dict[str, Any]:
    """Batch of an encoder-decoder: prompts (or prefixes) in ``input_ids``, answers (or suffixes) in ``labels``.

    Args:
        start: number of the first sample; with ``seed`` it decides where a caption is cut.

    Returns:
        What the processor gives, and ``labels`` ``[B, A]`` with -100 on padding.
    """
    pairs = [_prefix_suffix(sample, seed, start + i) for i, sample in enumerate(samples)]
    texts = [
        prompter.render(replace(sample, prompt=prefix)) for sample, (prefix, _) in zip(samples, pairs, strict=True)
    ]
    encoded = prompter.encode(texts, [sample.images for sample in samples])
    assert prompter.tokenizer is not None
    targets = [prompter.tokenizer(text_target=suffix, verbose=False)["input_ids"] for _, suffix in pairs]
    encoded["labels"] = pad_sequence([torch.tensor(t) for t in targets], batch_first=True, padding_value=IGNORED)
    return encoded


def _prefix_suffix(sample: Sample, seed: int, position: int) -> tuple[str, str]:
    """Prompt and answer; a caption alone is cut at a word drawn by (seed, position), as the paper does."""
    text = (sample.text or "").strip()
    if sample.prompt is not None or sample.messages:
        return sample.prompt or "", text
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"{seed}/{position}").randint(1, len(words) - 1)
    return " ".join(words[:cut]), " ".join(words[cut:])


def encode_continued(samples: Sequence[Sample], prompter: Prompter) -> dict[str, Any]:
    """Batch of a decoder: prompt and answer in ``input_ids``, the answer with its end alone in ``labels``.

    Returns:
        What the processor gives, and ``labels`` ``[B, L]`` with -100 on prompt, image and padding.

    Raises:
        CalibrationError: the processor changes the answer, so that it is not found again.
    """
    images = [sample.images for sample in samples]
    if prompter.takes_suffix and any(images):
        prompts = [prompter.render(sample) for sample in samples]
        return prompter.encode_suffixes(prompts, [(sample.text or "").strip() for sample in samples], images)
    texts, tails = [], []
    for sample in samples:
        prompt, joined = prompter.render(sample), prompter.render_answered(sample)
        before, ids = prompter.token_ids(prompt), prompter.token_ids(joined)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        texts.append(joined)
        tails.append(ids[same:])
    encoded = prompter.encode(texts, images)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = torch.full_like(ids, IGNORED)
    for row, tail in enumerate(tails):
        end = int(mask[row].nonzero()[-1]) + 1
        # Images only lengthen the prompt: counted from the end, the answer is where the tokenizer alone puts it.
        if ids[row, end - len(tail) : end].tolist() != tail:
            raise CalibrationError(
                "the processor changes the answer's tokens, so the prompt cannot be masked in the loss"
            )
        labels[row, end - len(tail) : end] = torch.tensor(tail)
    encoded["labels"] = labels
    return encoded
