"""Perplexity of the right answers, given image and prompt: it distinguishes models even if none answers right.

The perplexity of a language model (Jelinek et al., JASA 1977) on the answers alone, with the prompt as context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.likelihood import answer_likelihoods
from ecoflap.evaluation.task import (
    BUNDLED,
    Better,
    Group,
    Shared,
    Task,
    TaskResult,
    TestData,
    bundled_questions,
    check_finite,
    common_settings,
    in_chunks,
    open_data,
)
from ecoflap.model.trace import evaluating

TASK = "answer-perplexity"


@dataclass(frozen=True)
class AnswerPerplexity(Task):
    """exp(−Σ log p / number of tokens) over the tokens of all answers, each with its end token.

    The standard error is that of a ratio of sums over answers (delta method), whose lengths differ. ``by_group`` is
    the perplexity of each question type; ``n`` counts tokens.

    Data: prompts or questions with answers, with or without images; None = the bundled set. The sequence length is
    the most tokens of a prompt with its answer.
    """

    better: ClassVar[Better] = "less"
    hub_type: ClassVar[str] = "visual-question-answering"
    takes: ClassVar[tuple[str, ...]] = ("columns", "prompt_template", "image_folder")

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model generates no text, or there is no processor.
            CalibrationError: a sample has no prompt or no answer, or the model gives no logits for it.
            NonFiniteLoss: a log-likelihood is NaN or infinite.
        """
        if not callable(getattr(model, "generate", None)) or processor is None:
            raise InvalidOption(f"task '{TASK}' needs a model that generates text, and its processor")
        source = bundled_questions() if test.data is None else test.data
        reader = open_data(TASK, replace(test, data=source))
        collected: Shared[list[list[float]]] = Shared(test.workers)
        kinds: list[str | None] = []

        def scored(part: list[Sample]) -> list[list[float]]:
            found = answer_likelihoods(model, processor, part, reader.source, test.sequence_length)
            check_finite(found.total, "the log-likelihood of an answer", reader.source)
            return [list(answer) for answer in zip(found.total.tolist(), found.tokens.tolist(), strict=True)]

        with evaluating(model):
            for part in in_chunks(reader, test.batch_size, test.progress, TASK):
                asked = [_answered(index, sample, reader.source) for index, sample in part]
                kinds += [sample.kind for sample in asked]
                collected.add(partial(scored, asked))
        answers = [(total, int(tokens)) for of_part in collected.all() for total, tokens in of_part]
        value, stderr = perplexity_of(answers)
        groups: dict[str, list[tuple[float, int]]] = {}
        for kind, answer in zip(kinds, answers, strict=True):
            if kind is not None:
                groups.setdefault(kind, []).append(answer)
        found = {kind: perplexity_of(group) for kind, group in sorted(groups.items())}
        by_group = {kind: of_group for kind, (of_group, _) in found.items()} or None
        sizes = {kind: Group(len(groups[kind]), error) for kind, (_, error) in found.items()} or None
        settings = common_settings(reader, test, prompt_template=test.prompt_template, answers=len(answers)
        ) | ({"data": BUNDLED} if test.data is None else {})  # fmt: skip
        n = sum(tokens for _, tokens in answers)
        return TaskResult(
            TASK, "perplexity", value, stderr, n, settings, by_group, groups=sizes,
            losses=[-total / tokens for total, tokens in answers], tokens=[tokens for _, tokens in answers],
            kinds=kinds if groups else None,
        )  # fmt: skip


def perplexity_of(answers: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Perplexity and standard error from (log p, tokens) of each answer; the error of a single answer is None."""
    count, tokens = len(answers), sum(number for _, number in answers)
    mean = -math.fsum(total for total, _ in answers) / tokens
    value = math.exp(min(mean, 700.0))  # larger powers overflow a float
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
