"""Visual (or plain) question answering: generated answers, compared with the truth by the rule of VQAv2 or of GQA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.answers import answers_by_decoder
from ecoflap.calibration.models import needs_image
from ecoflap.calibration.prompts import Prompter
from ecoflap.calibration.sample import Sample
from ecoflap.calibration.sources import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.common import BUNDLED, Chunk, bundled_questions, common_settings, in_chunks, open_data, pictures
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.results import TaskResult, mean_and_stderr
from ecoflap.evaluation.shared import Shared
from ecoflap.evaluation.vqa_rule import exact_match, plain_match, soft_accuracy
from ecoflap.network.trace import evaluating
from ecoflap.progress import Progress
from ecoflap.registry import unknown
from ecoflap.workers import ALONE, Workers

MAX_NEW_TOKENS = 10  # of an answer, where the model's generation config does not say: the published VQA setting
RULES = {
    "soft": "vqa soft accuracy",
    "normalised": "exact match after VQA normalisation",
    "exact": "exact match, case aside",
}


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
    rule: str = "auto",
    beams: int = 1,
    length_penalty: float = 1.0,
    new_tokens: int | None = None,
) -> TaskResult:
    """Accuracy (0..1) of the model's answers; ``by_group`` has that of each question type if there is a column for it.

    Args:
        data: any source of :func:`ecoflap.calibration.load_samples` with questions and answers; None = the bundled set.
        samples: questions drawn with ``seed``; None for all.
        sequence_length: most tokens of a prompt, image included; None = no limit.
        columns, prompt_template, image_folder: as for calibration; without a template, a model with a text encoder for
            questions (BLIP) gets the question alone.
        rule: ``soft``, VQAv2's accuracy over the annotators; ``normalised``, equality after VQAv2's normalisation;
            ``exact``, equality of both in lower case without white space at the ends, as for GQA; ``auto``: ``soft``
            where the data has a column of annotators' answers, else ``normalised``.
        beams, length_penalty, new_tokens: as :func:`ecoflap.evaluation.generate.generate`; ``new_tokens`` is by
            default the model's ``generation_config.max_new_tokens``, or 10.

    Raises:
        InvalidOption: the model cannot generate, or there is no processor.
        UnknownName: no such rule.
        CalibrationError: the data has no questions or answers, or a prompt is too long.
    """
    if not callable(getattr(model, "generate", None)) or processor is None:
        raise InvalidOption("task 'vqa' needs a model that generates text, and its processor")
    if rule not in ("auto", *RULES):
        raise unknown("rule", rule, ["auto", *RULES])
    if prompt_template is None and answers_by_decoder(model):
        prompt_template = "{question}"
    reader = open_data(
        "vqa",
        bundled_questions() if data is None else data,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        columns=columns,
        prompt_template=prompt_template,
        image_folder=image_folder,
    )
    score, name = _rule(rule, reader)
    must_see = needs_image(model)
    if must_see and not {"image", "messages"} & reader.columns.keys():
        raise CalibrationError(f"{reader.source} has no images, but {type(model).__name__} needs images")
    prompter = Prompter(model, processor)
    longest = new_tokens or getattr(getattr(model, "generation_config", None), "max_new_tokens", None) or MAX_NEW_TOKENS
    decoding: dict[str, Any] = {"new_tokens": longest, "beams": beams, "length_penalty": length_penalty}
    told: Shared[list[dict[str, Any]]] = Shared(workers)

    def answered(part: Chunk) -> list[dict[str, Any]]:
        answers = generate(model, prompter, [sample for _, sample in part], limit=sequence_length, **decoding)
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
        for part in in_chunks(reader, batch_size, progress, "vqa"):
            if must_see:
                pictures(part, "vqa", reader.source)
            told.add(partial(answered, part))
    predictions = [record for of_part in told.all() for record in of_part]
    value, stderr = mean_and_stderr([record["score"] for record in predictions])
    groups: dict[str, list[float]] = {}
    for record in predictions:
        if "kind" in record:
            groups.setdefault(record["kind"], []).append(record["score"])
    settings = common_settings(
        reader,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        rule=name,
        prompt_template=prompt_template,
        max_new_tokens=longest,
        beams=beams,
        length_penalty=length_penalty,
    ) | ({"data": BUNDLED} if data is None else {})
    by_group = {kind: mean_and_stderr(group)[0] for kind, group in sorted(groups.items())} or None
    return TaskResult("vqa", "accuracy", value, stderr, len(predictions), settings, by_group, predictions)


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
