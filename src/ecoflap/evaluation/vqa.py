"""Visual (or plain) question answering: generates answers, and scores them by the rule of VQAv2 or of GQA."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ecoflap.data.encode import answers_by_decoder
from ecoflap.data.model_facts import needs_image
from ecoflap.data.prompts import Prompter
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.task import (
    BUNDLED,
    Chunk,
    Group,
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    bundled_questions,
    common_settings,
    in_chunks,
    mean_and_stderr,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.registry import unknown

ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Only forms whose spelling without the apostrophe is no other word ("its", "were", "well" stay as they are).
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's how'd
how'll how's i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd somebody'll somebody's someone'd
someone'll someone's something'd something'll that'd that'll that's there'd there're there's they'd they'll they're
they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'll you're you've
"""

CONTRACTIONS = {form.replace("'", ""): form for form in _FORMS.split()}
DIGIT_COMMA = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"\.(?!\d)")


def normalize(answer: str) -> str:
    """The answer in lower case without punctuation and articles, with digits for number words and apostrophes restored.

    A punctuation mark beside a space is dropped, or any mark if the answer has a comma between digits; others become a
    space ("red/blue" → "red blue"). A period is kept only before a digit.
    """
    text = " ".join(answer.split())
    dropped = DIGIT_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if dropped or beside_space else " ")
    out = LONE_PERIOD.sub("", out).lower()
    words = [DIGITS.get(word, word) for word in out.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact_match(prediction: str, truth: str) -> float:
    """1.0 if both are equal after :func:`normalize`, else 0.0."""
    return float(normalize(prediction) == normalize(truth))


def plain_match(prediction: str, truth: str) -> float:
    """1.0 if both are equal in lower case without white space at the ends (as GQA's answers are compared), else 0.0."""
    return float(prediction.strip().lower() == truth.strip().lower())


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over all subsets that leave one annotator out (the VQAv2 rule).

    With a single answer there is no such subset, and it is :func:`exact_match`.
    """
    if len(answers) == 1:
        return exact_match(prediction, answers[0])
    said = normalize(prediction)
    hits = [normalize(answer) == said for answer in answers]
    total = sum(hits)
    return sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits)


MAX_NEW_TOKENS = 10  # default length of an answer, if the model's generation config has none: the published setting

RULES = {
    "soft": "vqa soft accuracy",
    "normalised": "exact match after VQA normalisation",
    "exact": "exact match, case aside",
}


@dataclass(frozen=True)
class Vqa(Task):
    """Accuracy (0..1) of the model's answers; ``by_group`` has that of each question type if there is such a column.

    Data: any source of :func:`ecoflap.data.load_samples` with questions and answers; None = the bundled set. Without a
    prompt template, a model with a text encoder for questions (BLIP) gets only the question.

    Attributes:
        rule: ``soft``, VQAv2's accuracy over the annotators; ``normalised``, equality after VQAv2's normalisation;
            ``exact``, equality in lower case without white space at the ends, as for GQA; ``auto``: ``soft`` if the
            data has a column of annotators' answers, else ``normalised``.
        beams, length_penalty, new_tokens: as :func:`ecoflap.evaluation.generate.generate`; ``new_tokens`` is by
            default the model's ``generation_config.max_new_tokens``, or 10.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "visual-question-answering"
    takes: ClassVar[tuple[str, ...]] = ("columns", "prompt_template", "image_folder")

    rule: str = "auto"
    beams: int = 1
    length_penalty: float = 1.0
    new_tokens: int | None = None

    def check_source(self, reader: SampleReader) -> None:
        _rule(self.rule, reader)

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model cannot generate, or there is no processor.
            UnknownName: no such rule.
            CalibrationError: the data has no questions or answers, or a prompt is too long.
        """
        if not callable(getattr(model, "generate", None)) or processor is None:
            raise InvalidOption("task 'vqa' needs a model that generates text, and its processor")
        if self.rule not in ("auto", *RULES):
            raise unknown("rule", self.rule, ["auto", *RULES])
        asked = test if test.data is not None else replace(test, data=bundled_questions())
        if test.prompt_template is None and answers_by_decoder(model):
            asked = replace(asked, prompt_template="{question}")
        reader = open_data("vqa", asked)
        score, name = _rule(self.rule, reader)
        must_see = needs_image(model)
        if must_see and not {"image", "messages"} & reader.columns.keys():
            raise CalibrationError(f"{reader.source} has no images, but {type(model).__name__} needs images")
        prompter = Prompter(model, processor)
        own = getattr(getattr(model, "generation_config", None), "max_new_tokens", None)
        longest = self.new_tokens or own or MAX_NEW_TOKENS
        decoding: dict[str, Any] = {"new_tokens": longest, "beams": self.beams, "length_penalty": self.length_penalty}
        collected: Shared[list[dict[str, Any]]] = Shared(test.workers)

        def answered(part: Chunk) -> list[dict[str, Any]]:
            answers = generate(model, prompter, [sample for _, sample in part], limit=test.sequence_length, **decoding)
            return [
                {
                    "index": index,
                    "question": sample.question,
                    "prediction": answer,
                    "truth": _truth(sample),
                    "score": score(sample, answer),
                } | ({"kind": sample.kind} if sample.kind is not None else {})
                for (index, sample), answer in zip(part, answers, strict=True)
            ]  # fmt: skip

        with evaluating(model):
            for part in in_chunks(reader, test.batch_size, test.progress, "vqa"):
                if must_see:
                    pictures(part, "vqa", reader.source)
                collected.add(partial(answered, part))
        predictions = [record for of_part in collected.all() for record in of_part]
        value, stderr = mean_and_stderr([record["score"] for record in predictions])
        groups: dict[str, list[float]] = {}
        for record in predictions:
            if "kind" in record:
                groups.setdefault(record["kind"], []).append(record["score"])
        settings = common_settings(
            reader,
            test,
            rule=name,
            prompt_template=asked.prompt_template,
            max_new_tokens=longest,
            beams=self.beams,
            length_penalty=self.length_penalty,
        ) | ({"data": BUNDLED} if test.data is None else {})
        found = {kind: (len(group), mean_and_stderr(group)) for kind, group in sorted(groups.items())}
        by_group = {kind: of_group for kind, (_, (of_group, _)) in found.items()} or None
        sizes = {kind: Group(count, error) for kind, (count, (_, error)) in found.items()} or None
        return TaskResult(
            "vqa", "accuracy", value, stderr, len(predictions), settings, by_group, predictions, groups=sizes
        )


def _truth(sample: Sample) -> str:
    return sample.text or (sample.answers[0] if sample.answers else "")


def _rule(rule: str, reader: SampleReader) -> tuple[Callable[[Sample, str], float], str]:
    """The function that scores an answer, and its name for the settings."""
    has_answers = "answers" in reader.columns
    asks = bool({"question", "prompt"} & reader.columns.keys())
    if not ("messages" in reader.columns or (asks and ("text" in reader.columns or has_answers))):  # a chat has both
        raise CalibrationError(f"{reader.source} needs columns with questions and with answers for task 'vqa'")
    if rule == "auto":
        rule = "soft" if has_answers else "normalised"
    if rule == "soft":
        if not has_answers:
            raise CalibrationError(
                f"{reader.source} has no column with the annotators' answers, which rule 'soft' needs: name it as "
                "column answers, or use rule 'normalised'"
            )
        return lambda sample, said: soft_accuracy(said, sample.answers or ()), RULES[rule]
    match = plain_match if rule == "exact" else exact_match
    return lambda sample, said: match(said, _truth(sample)), RULES[rule]
