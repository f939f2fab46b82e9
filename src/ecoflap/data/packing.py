"""Packs plain text into windows of equal length: tokenises it once, cuts it without overlap, draws with the seed.

If a tokenizer puts special tokens before a text (the BOS token of LLaMA and Gemma), the model was trained with them, so
each window begins with them. ``window_start="once"`` puts them once before the whole text, as the published code of
GPTQ, SparseGPT and Wanda does.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecoflap.data.model_facts import max_length
from ecoflap.data.prompts import using_processor
from ecoflap.data.samples import SampleSet
from ecoflap.errors import CalibrationError, InvalidOption

WINDOW_STARTS = ("each", "once")


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        tokens: ``[tokens]``, without the special tokens before them.
        start: special tokens that the tokenizer puts before a text.
    """

    tokens: torch.Tensor
    start: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.start) + len(self.tokens)

    def windows(self, length: int, window_start: str = "each", offset: int = 0) -> torch.Tensor:
        """All windows that don't overlap, in order: ``[windows, length]``.

        Args:
            window_start: "each" window begins with the special tokens, or "once" the text as a whole.
            offset: tokens to leave out before the first window.

        Raises:
            InvalidOption: no such ``window_start``, or a window has no room for text after the special tokens.
        """
        if window_start not in WINDOW_STARTS:
            raise InvalidOption(f"window_start must be one of {', '.join(WINDOW_STARTS)}, not {window_start}")
        start = torch.tensor(self.start, dtype=torch.long)
        each = window_start == "each"
        text = self.tokens if each else torch.cat([start, self.tokens])
        room = length - len(start) if each else length
        if room < 1:
            raise InvalidOption(f"a sequence length of {length} has no room for text after {len(start)} special tokens")
        count = max(len(text) - offset, 0) // room
        rows = text[offset : offset + count * room].view(count, room)
        return torch.cat([start.expand(count, -1), rows], dim=1) if each else rows

    def spare(self, length: int, window_start: str = "each") -> int:
        """Tokens that are left over after all windows are cut."""
        each = window_start == "each"
        return len(self.tokens if each else self) % (length - len(self.start) if each else length)


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the special tokens that the tokenizer puts before a text."""
    text = "a"
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    plain = list(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    for place in range(len(whole) - len(plain) + 1):
        if plain and whole[place : place + len(plain)] == plain:
            return tuple(whole[:place])
    return ()


def tokenize_corpus(sample_set: SampleSet, tokenizer: Any) -> Corpus:
    """All documents, joined by a blank line and tokenised as one text."""
    text = "\n\n".join(sample.text for sample in sample_set.samples if sample.text is not None)
    with using_processor():
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        start = start_tokens(tokenizer)
    if tuple(tokens[: len(start)].tolist()) != start:
        return Corpus(tokens, ())
    return Corpus(tokens[len(start) :], start)


def check_length(model: nn.Module, asked: int | None) -> None:
    """Raises CalibrationError for a length shorter than 2, or longer than the model has positions for."""
    if asked is None:
        return
    if asked < 2:
        raise CalibrationError(f"the sequence length must be at least 2 tokens, not {asked}")
    limit = max_length(model)
    if limit is not None and asked > limit:
        raise CalibrationError(
            f"a sequence length of {asked} tokens is more than the model's {limit} positions: lower it"
        )


def draw_windows(
    corpus: Corpus, length: int, count: int | None, seed: int, source: str, window_start: str = "each"
) -> torch.Tensor:
    """``count`` windows ``[count, length]`` of a text that don't overlap, at a seeded offset and in a seeded order.

    Args:
        count: None for all windows. If there are fewer, all are taken, with a warning.

    Raises:
        CalibrationError: the text is shorter than a window.
        InvalidOption: as :meth:`Corpus.windows`.
    """
    available = len(corpus.windows(length, window_start))
    if available == 0:
        raise CalibrationError(
            f"{source} has {len(corpus)} tokens, less than one window of {length}: give more text, or a smaller "
            "sequence length"
        )
    if available < (count or 1):
        warnings.warn(
            f"{source} gives {available} windows of {length} tokens ({len(corpus)} tokens in all), {count} were asked "
            "for: all of them are taken; more text or a smaller sequence length gives more",
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(corpus.spare(length, window_start) + 1, (1,), generator=generator))
    order = torch.randperm(available, generator=generator)[: count or available]
    return corpus.windows(length, window_start, offset)[order].contiguous()
