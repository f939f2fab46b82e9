"""Perplexity of the right answers, given picture and prompt: still tells models apart where none answers right.

The perplexity of a language model (Jelinek et al., JASA 1977) on the answers alone, with the prompt as context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.likelihood import answer_likelihoods
from ecoflap.evaluation.task import (
    BUNDLED,
    Shared,
    TaskResult,
    bundled_questions,
    check_finite,
    common_settings,
    in_chunks,
    open_data,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.progress import Progress
from ecoflap.support.workers import ALONE, Workers

TASK = "answer-perplexity"


@torch.no_grad()
def run(
    model: nn.Module,
    processor: Any,
    *,
    data: str | Path | None,
    samples: int | None,
    batch_size: int,
    sequence_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    workers: Workers = ALONE,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    image_folder: str | Path | None = None,
) -> TaskResult:
    """exp(−Σ log p / number of tokens) over the tokens of all answers, each with its end token.

    The standard error is that of a ratio of sums over answers (delta method), whose lengths differ. ``by_group`` is
    the perplexity of each question type; ``n`` counts tokens.

    Args:
        data: prompts or questions with answers, with or without pictures; None = the bundled set.
        samples: questions drawn with ``seed``; None for all.
        sequence_length: most tokens of a prompt with its answer; None for no limit.
        columns, prompt_template, image_folder: as for calibration.

    Raises:
        InvalidOption: the model generates no text, or there is no processor.
        CalibrationError: a sample has no prompt or no answer, or the model gives no logits for it.
        NonFiniteLoss: a log-likelihood is NaN or infinite.
    """
    if not callable(getattr(model, "generate", None)) or processor is None:
        raise InvalidOption(f"task '{TASK}' needs a model that generates text, and its processor")
    options: dict[str, Any] = {"columns": columns, "prompt_template": prompt_template, "image_folder": image_folder}
    source = bundled_questions() if data is None else data
    reader = open_data(TASK, source, samples=samples, seed=seed, batch_size=batch_size, **options)
    told: Shared[list[list[float]]] = Shared(workers)
    kinds: list[str | None] = []

    def scored(part: list[Sample]) -> list[list[float]]:
        found = answer_likelihoods(model, processor, part, reader.source, sequence_length)
        check_finite(found.total, "the log-likelihood of an answer", reader.source)
        return [list(answer) for answer in zip(found.total.tolist(), found.tokens.tolist(), strict=True)]

    with evaluating(model):
        for part in in_chunks(reader, batch_size, progress, TASK):
            asked = [_answered(index, sample, reader.source) for index, sample in part]
            kinds += [sample.kind for sample in asked]
            told.add(partial(scored, asked))
    answers = [(total, int(tokens)) for of_part in told.all() for total, tokens in of_part]
    value, stderr = perplexity_of(answers)
    groups: dict[str, list[tuple[float, int]]] = {}
    for kind, answer in zip(kinds, answers, strict=True):
        if kind is not None:
            groups.setdefault(kind, []).append(answer)
    by_group = {kind: perplexity_of(group)[0] for kind, group in sorted(groups.items())} or None
    settings = common_settings(
        reader, samples=samples, seed=seed, batch_size=batch_size, prompt_template=prompt_template, answers=len(answers)
    ) | ({"data": BUNDLED} if data is None else {})  # fmt: skip
    return TaskResult(TASK, "perplexity", value, stderr, sum(tokens for _, tokens in answers), settings, by_group)


def perplexity_of(answers: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Perplexity and standard error of (log p, tokens) of each answer; no error of a single answer."""
    count, tokens = len(answers), sum(number for _, number in answers)
    mean = -math.fsum(total for total, _ in answers) / tokens
    value = math.exp(min(mean, 700.0))  # e^700 is the end of what a float holds
    if count < 2:
        return value, None
    squares = math.fsum((-total - mean * number) ** 2 for total, number in answers)
    return value, value * math.sqrt(squares * count / (count - 1)) / tokens


def _answered(index: int, sample: Sample, source: str) -> Sample:
    text = sample.text or (sample.answers[0] if sample.answers else "")
    if not text.strip():
        raise CalibrationError(f"{source}: row {index} has no answer: task '{TASK}' needs one with every row")
    if sample.prompt is None and not sample.messages:
        raise CalibrationError(
            f"{source}: row {index} has no question: task '{TASK}' needs one with every row, or the same prompt for "
            "all as --test-prompt"
        )
    return replace(sample, text=text)
