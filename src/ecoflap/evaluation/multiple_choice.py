"""Multiple choice by log-likelihood: the most likely option is the answer; no text is generated.

Style ``letters`` shows all options and compares the letters after "Answer:", with the published prompt of MMLU
(Hendrycks et al., ICLR 2021); style ``text`` compares the options themselves, each as the continuation of the question
(PIQA, ARC, OpenBookQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ecoflap.data.model_facts import needs_image
from ecoflap.data.prompts import tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.likelihood import Request, Scorer
from ecoflap.evaluation.task import (
    Group,
    Measured,
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    common_settings,
    in_chunks,
    measured,
    open_data,
    read_as,
)

TASK = "multiple-choice"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INTRODUCTION = "The following are multiple choice questions (with answers)"
PLAIN_TEMPLATE = "Question: {question}\nAnswer:"  # of style text, as in lm-eval for PIQA and ARC

Style = Literal["letters", "text"]
Shot = tuple[int, Sample]  # (row of its source, sample)


@dataclass(frozen=True)
class Prompts:
    """Writes a question with the examples before it."""

    style: Style
    template: str | None

    def render(self, sample: Sample, shots: Sequence[Sample]) -> str:
        head = ""
        if self.style == "letters":
            about = f" about {sample.kind.replace('_', ' ')}" if sample.kind else ""
            head = f"{INTRODUCTION}{about}.\n\n"
        examples = [f"{self._question(shot)} {self.continuations(shot)[right(shot)].strip()}" for shot in shots]
        return head + "\n\n".join([*examples, self._question(sample)])

    def _question(self, sample: Sample) -> str:
        question = (sample.question or "").strip()
        if self.style == "text":
            return (self.template or PLAIN_TEMPLATE).format(question=question)
        if self.template is not None:
            question = self.template.format(question=question)
        lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, sample.choices or (), strict=False)]
        return "\n".join([question, *lines, "Answer:"])

    def continuations(self, sample: Sample) -> list[str]:
        """The texts to compare, each with a space before it."""
        choices = sample.choices or ()
        return [f" {LETTERS[i] if self.style == 'letters' else choice.strip()}" for i, choice in enumerate(choices)]


def right(sample: Sample) -> int:
    """Index of the right choice."""
    return (sample.choices or ()).index(sample.text or "")


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Accuracy (0..1): the share of questions whose right choice has the highest log-likelihood.

    ``others``: ``acc_norm`` (style ``text``: log-likelihood per byte of the choice's UTF-8 text) and, where questions
    have subjects, ``macro_accuracy``, the mean of the subjects' accuracies with the standard error
    √(Σ stderr² of each)/subjects. ``by_group`` has the subjects.

    Data: any source with questions, choices and the right one; a subject in the ``kind`` column. The prompt template
    has ``{question}``, and replaces the question (letters) or "Question: ... Answer:" (text). The sequence length is
    the most tokens of prompt and choice, default the model's longest; a longer question gets fewer examples, as in
    MMLU's code, and ``settings["shortened"]`` counts these. The batch size is in sequences.

    Attributes:
        style: ``letters`` or ``text``.
        shots: number of examples before each question: the first ones of the same subject (of all data, without
            subjects).
        shots_source: data of the examples, such as MMLU's dev split; default the other questions.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "multiple-choice"
    takes: ClassVar[tuple[str, ...]] = ("columns", "prompt_template")

    style: Style = "letters"
    shots: int = 0
    shots_source: str | None = None

    def check_source(self, reader: SampleReader) -> None:
        _check(reader)

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model does not take text without images, or an option is out of range.
            CalibrationError: the data has no questions with choices, too few for the examples, or a question is too
                long.
        """
        style, shots, prompt_template = self.style, self.shots, test.prompt_template
        if tokenizer_of(processor) is None or needs_image(model) or not _speaks(model):
            raise InvalidOption(f"task '{TASK}' needs a language model with a tokenizer, not {type(model).__name__}")
        if shots < 0:
            raise InvalidOption(f"shots must be 0 or more, not {shots}")
        reader = open_data(TASK, test)
        _check(reader)
        shown = test if self.shots_source is None else replace(test, data=self.shots_source)
        source = _all_of(shown) if shots else reader
        examples = _Examples(source, shots, same=self.shots_source is None)
        asked = _Asker(Scorer(model, processor, test.sequence_length), Prompts(style, prompt_template), examples)
        collected: Shared[dict[str, Any]] = Shared(test.workers)
        was_training = model.training
        model.eval()
        try:
            for part in in_chunks(reader, max(test.batch_size, 16), test.progress, TASK):
                collected.add(partial(asked.answer, part, test.batch_size, reader.source))
        finally:
            model.train(was_training)
        parts = collected.all()
        predictions = [record for of_part in parts for record in of_part["records"]]
        shortened = sum(of_part["shortened"] for of_part in parts)
        settings = common_settings(reader, test, style=style, shots=shots,
            shots_source=self.shots_source, prompt_template=prompt_template, shortened=shortened,
        )  # fmt: skip
        return _result(predictions, settings, style)


def _speaks(model: nn.Module) -> bool:
    generates = getattr(model, "can_generate", None)
    return callable(generates) and bool(generates())


def _check(reader: SampleReader) -> None:
    if "choices" not in reader.columns or "text" not in reader.columns:
        raise CalibrationError(
            f"{reader.source} needs columns with a question, its choices and the right one for task '{TASK}': it was "
            f"read as {read_as(reader)}; set them with columns"
        )


def _all_of(test: TestData) -> SampleReader:
    """A reader of all questions in the order of the data."""
    found = open_data(TASK, replace(test, samples=None, seed=0))
    _check(found)
    return found


class _Examples:
    """The examples for a question: the first ones of its subject."""

    def __init__(self, source: SampleReader, shots: int, *, same: bool) -> None:
        self._shots, self._same, self.name = shots, same, source.source
        self._by_kind: dict[str | None, list[Shot]] = {}
        for index, sample in source if shots else ():
            held = self._by_kind.setdefault(sample.kind, [])
            if len(held) < shots + same and sample.text is not None:
                held.append((index, sample))

    def of(self, index: int, sample: Sample) -> list[Sample]:
        held = self._by_kind.get(sample.kind) or (self._by_kind.get(None, []) if not self._same else [])
        found = [shot for number, shot in held if not (self._same and number == index)]
        if len(found) < self._shots:
            about = f" about {sample.kind}" if sample.kind else ""
            raise CalibrationError(
                f"{self.name} has {len(found)} examples{about} for {self._shots} shots: lower shots, or give "
                "shots_source"
            )
        return found[: self._shots]


class _Asker:
    def __init__(self, scorer: Scorer, prompts: Prompts, examples: _Examples) -> None:
        self._scorer, self._prompts, self._examples = scorer, prompts, examples
        self._shortened = 0

    def answer(self, part: Sequence[Shot], batch_size: int, source: str) -> dict[str, Any]:
        """``records``, one per question, and the number that are ``shortened``."""
        before = self._shortened
        asked = [self._requests(index, sample, source) for index, sample in part]
        scores = iter(self._scorer.score([request for each in asked for request in each], batch_size))
        records = [
            _record(index, sample, list(islice(scores, len(each))), self._prompts.style)
            for (index, sample), each in zip(part, asked, strict=True)
        ]
        return {"records": records, "shortened": self._shortened - before}

    def _requests(self, index: int, sample: Sample, source: str) -> list[Request]:
        if sample.choices is None or sample.text is None:
            raise CalibrationError(
                f"{source}: question {index} has no answer: some data sets don't publish the answers of a split"
            )
        shots = self._examples.of(index, sample)
        for count in range(len(shots), -1, -1):
            context = self._prompts.render(sample, shots[:count])
            found = [self._scorer.encode(context, collected) for collected in self._prompts.continuations(sample)]
            if all(self._scorer.fits(request) for request in found):
                self._shortened += count < len(shots)
                return found
        raise CalibrationError(
            f"{source}: question {index} has {max(map(len, found))} tokens, more than the {self._scorer.limit} that "
            "the model or the sequence length allows"
        )


def _record(index: int, sample: Sample, scores: list[float], style: Style) -> dict[str, Any]:
    assert sample.choices is not None
    best = scores.index(max(scores))
    record = {
        "index": index,
        "question": sample.question,
        "prediction": sample.choices[best],
        "truth": sample.text,
        "score": float(sample.choices[best] == sample.text),
        "loglikelihoods": scores,
    }
    if style == "text":
        by_byte = [s / max(len(c.strip().encode()), 1) for s, c in zip(scores, sample.choices, strict=True)]
        record["score_norm"] = float(sample.choices[by_byte.index(max(by_byte))] == sample.text)
    return record | ({"kind": sample.kind} if sample.kind is not None else {})


def _result(predictions: list[dict[str, Any]], settings: dict[str, Any], style: Style) -> TaskResult:
    accuracy = measured([record["score"] for record in predictions])
    others: dict[str, Measured] = {}
    if style == "text":
        others["acc_norm"] = measured([record["score_norm"] for record in predictions])
    groups: dict[str, list[float]] = {}
    for record in predictions:
        if "kind" in record:
            groups.setdefault(record["kind"], []).append(record["score"])
    by_group = {kind: measured(scores) for kind, scores in sorted(groups.items())}
    if by_group:
        mean = sum(group.value for group in by_group.values()) / len(by_group)
        errors = [group.stderr for group in by_group.values() if group.stderr is not None]
        known = len(errors) == len(by_group)  # a subject with a single question has no standard error
        spread = sum(error**2 for error in errors) ** 0.5 / len(by_group) if known else None
        # Each answer is weighted so that the mean is the macro accuracy.
        weights = {kind: len(predictions) / (len(by_group) * len(scores)) for kind, scores in groups.items()}
        weighed = [weights[record["kind"]] * record["score"] for record in predictions if "kind" in record]
        others["macro_accuracy"] = Measured(mean, spread, weighed)
    return TaskResult(
        TASK, "accuracy", accuracy.value, accuracy.stderr, len(predictions), settings,
        {kind: group.value for kind, group in by_group.items()} or None, predictions, others,
        groups={kind: Group(len(groups[kind]), group.stderr) for kind, group in by_group.items()} or None,
    )  # fmt: skip
