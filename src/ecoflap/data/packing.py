"""Plain text to windows of equal length: tokenised whole once, cut without overlap, chosen with the seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ecoflap.data.model_facts import DEFAULT_LENGTH, max_length
from ecoflap.data.samples import SampleSet
from ecoflap.errors import CalibrationError


def window_length(model: nn.Module, tokenizer: Any, asked: int | None) -> int:
    """Tokens in a window: ``asked``, by default the model's longest up to 2,048.

    Raises:
        CalibrationError: shorter than 2, or longer than the model has positions for.
    """
    limit = max_length(model)
    if asked is None:
        known = int(getattr(tokenizer, "model_max_length", 0) or 0)
        usual = known if 2 <= known < 10**6 else DEFAULT_LENGTH  # tokenizers say 1e30 for "no limit"
        return min(limit or usual, DEFAULT_LENGTH)
    if asked < 2:
        raise CalibrationError(f"the sequence length must be at least 2 tokens, not {asked}")
    if limit is not None and asked > limit:
        raise CalibrationError(
            f"a sequence length of {asked} tokens is more than the model's {limit} positions: lower it"
        )
    return asked


def tokenize_corpus(sample_set: SampleSet, tokenizer: Any) -> torch.Tensor:
    """All documents, joined by a blank line and tokenised as one text, special tokens once: ``[tokens]``."""
    text = "\n\n".join(sample.text for sample in sample_set.samples if sample.text is not None)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def draw_windows(tokens: torch.Tensor, length: int, count: int | None, seed: int, source: str) -> torch.Tensor:
    """``count`` windows ``[count, length]`` of ``tokens`` that don't overlap, at a seeded offset and in a seeded order.

    Args:
        count: None for all that there are.

    Raises:
        CalibrationError: the text gives fewer windows.
    """
    available = len(tokens) // length
    if available < max(count or 1, 1):
        raise CalibrationError(
            f"{source} gives {available} windows of {length} tokens ({len(tokens)} tokens in all), {count or 1} were "
            "asked for: give more text, fewer samples or a smaller sequence length"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(tokens) - available * length + 1, (1,), generator=generator))
    order = torch.randperm(available, generator=generator)[: count or available]
    return tokens[offset : offset + available * length].view(available, length)[order].contiguous()
