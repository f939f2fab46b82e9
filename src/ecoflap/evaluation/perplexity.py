"""Perplexity of a causal language model on plain text in fixed windows, as in the papers on pruning LLMs.

The text is tokenised once and cut into windows of equal length that don't overlap. Each window is scored on its own,
without its first token and the special tokens at its beginning.

Source: the setting of GPTQ (Frantar et al., 2022), SparseGPT and Wanda (Sun et al., 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ecoflap.data.model_facts import can_take, is_encoder_decoder, to_device
from ecoflap.data.packing import check_length, tokenize_corpus
from ecoflap.data.prompts import tokenizer_of
from ecoflap.data.samples import SampleReader, load_samples
from ecoflap.data.window_length import default_length
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.evaluation.task import Better, Shared, Task, TaskResult, TestData, mean_and_stderr

LOGITS_AT_ONCE = 2**24  # fp32 logits that the loss is computed on at a time (64 MiB), for any vocabulary


@dataclass(frozen=True)
class Perplexity(Task):
    """exp(mean negative log-likelihood of a token); every window has the same weight.

    The standard error is that of the mean over windows, times the perplexity (delta method): neighbouring tokens are
    not independent, windows nearly are. ``n`` is the number of scored tokens, windows × (sequence length − 1) if a
    window begins with at most one special token.

    Data: a text file, a folder of them, or a data set with a text column (the role ``text``; by default guessed).
    Samples: the number of windows, the first ones; the seed has no effect. The sequence length is that of a window;
    default one that fits model, machine and text.
    """

    better: ClassVar[Better] = "less"
    takes: ClassVar[tuple[str, ...]] = ("columns",)

    def check_source(self, reader: SampleReader) -> None:
        if not reader.is_text:
            raise CalibrationError(
                f"{reader.source} is not plain text: task 'perplexity' needs a text file or a text column alone"
            )

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: no data, or the model is no causal language model with a tokenizer.
            CalibrationError: the text is shorter than a window.
            NonFiniteLoss: a window's loss is NaN or infinite.
        """
        data, samples, batch_size, window_start = test.data, test.samples, test.batch_size, test.window_start
        tokenizer = tokenizer_of(processor)
        if data is None:
            raise InvalidOption("task 'perplexity' needs a text: give a file as data")
        generates = getattr(model, "can_generate", None)  # a plain module does not have it
        if tokenizer is None or is_encoder_decoder(model) or (callable(generates) and not generates()):
            raise InvalidOption(
                f"task 'perplexity' needs a causal language model with a tokenizer, not {type(model).__name__}"
            )
        if batch_size < 1 or (samples is not None and samples < 1):
            raise InvalidOption("the batch size and the number of samples must be at least 1")
        check_length(model, test.sequence_length)
        corpus = load_samples(data, samples=None, seed=test.seed, columns=test.columns)
        if corpus.windows is None:
            raise CalibrationError(
                f"{data} is not plain text: task 'perplexity' needs a text file or a text column alone"
            )
        tokens = tokenize_corpus(corpus, tokenizer)
        length, reason = test.sequence_length, ""
        if length is None:
            chosen = default_length(model, tokenizer, len(tokens), samples or 1, batch_size, work="test")
            length, reason = chosen.tokens, chosen.reason
        windows = tokens.windows(length, window_start)[:samples]
        count = len(windows)
        if count == 0:
            raise CalibrationError(f"{data} has {len(tokens)} tokens, less than one window of {length}: give more text")
        first = max(len(tokens.start), 1) if window_start == "each" else 1  # the first token that is scored
        collected: Shared[list[float]] = Shared(test.workers)
        was_training = model.training
        model.eval()
        try:
            with test.progress.stage("perplexity", total=count) as bar:
                for part in torch.split(windows, batch_size):
                    collected.add(partial(_window_losses, model, part, first))
                    bar.advance(len(part))
        finally:
            model.train(was_training)
        losses = [loss for of_part in collected.all() for loss in of_part]
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss of window {number} of {data} is {loss}: the model is broken, or needs float32"
                )
        mean, error = mean_and_stderr(losses)
        value = math.exp(min(mean, 700.0))  # larger powers overflow a float
        settings = {
            "data": str(data),
            "sequence_length": length,
            **({"length_reason": reason} if reason else {}),
            "window_start": window_start,
            "windows": count,
            "samples": samples,
            "batch_size": batch_size,
        }
        stderr = None if error is None else value * error
        return TaskResult("perplexity", "perplexity", value, stderr, count * (length - first), settings, losses=losses)


def _window_losses(model: nn.Module, windows: torch.Tensor, first: int) -> list[float]:
    """Mean negative log-likelihood of each row of ``windows`` ``[B, L]`` from its token ``first`` on.

    In fp32 from the model's logits.
    """
    extra: dict[str, Any] = {"use_cache": False} if can_take(model, "use_cache") else {}
    ids = to_device({"input_ids": windows}, model)["input_ids"]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    losses: list[float] = []
    for row, target in zip(logits, ids, strict=True):
        total = 0.0
        for start in range(first - 1, len(target) - 1, rows):
            end = min(start + rows, len(target) - 1)
            part = F.cross_entropy(row[start:end].float(), target[start + 1 : end + 1], reduction="sum")
            total += float(part)
        losses.append(total / (len(target) - first))
    return losses
