"""Visual (or plain) question answering: greedy answers, compared with the truth by the VQA rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.models import needs_image
from ecoflap.calibration.prompts import Prompter
from ecoflap.calibration.sources import Sample, SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.results import TaskResult, mean_and_stderr
from ecoflap.evaluation.vqa_rule import exact_match, soft_accuracy
from ecoflap.progress import Progress, Silent

MAX_NEW_TOKENS = 10  # of an answer, where the model's generation config does not say: the published VQA setting


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
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
) -> TaskResult:
    """Accuracy (0..1) of the model's greedy answers.

    With an ``answers`` column of several annotators it is VQAv2's soft accuracy, otherwise exact match after the same
    normalisation. ``by_group`` has the accuracy of each question type if there is a column for it.

    Args:
        data: any source of :func:`ecoflap.calibration.load_samples` with questions and answers; None = the bundled set.
        samples: questions drawn with ``seed``; None for all.
        sequence_length: most tokens of a prompt, image included; None = no limit.
        columns, prompt_template: as for calibration.

    Raises:
        InvalidOption: the model cannot generate, or there is no processor.
        CalibrationError: the data has no questions or answers, or a prompt is too long.
    """
    if not callable(getattr(model, "generate", None)) or processor is None:
        raise InvalidOption("task 'vqa' needs a model that generates text, and its processor")
    if batch_size < 1:
        raise InvalidOption(f"the batch size must be at least 1, not {batch_size}")
    reader = SampleReader(
        _bundled() if data is None else data,
        samples=samples,
        seed=seed,
        columns=columns,
        prompt_template=prompt_template,
    )
    if not {"question", "prompt"} & reader.columns.keys() or not {"text", "answers"} & reader.columns.keys():
        raise CalibrationError(f"{reader.source} needs columns with questions and with answers for task 'vqa'")
    if needs_image(model) and "image" not in reader.columns:
        raise CalibrationError(f"{reader.source} has no images, but {type(model).__name__} needs images")
    prompter = Prompter(model, processor)
    new_tokens = getattr(getattr(model, "generation_config", None), "max_new_tokens", None) or MAX_NEW_TOKENS
    scores: list[float] = []
    predictions: list[dict[str, Any]] = []
    was_training = model.training
    model.eval()
    try:
        with (progress or Silent()).stage("vqa", total=len(reader)) as task:
            for part in _chunks(reader, batch_size):
                answers = generate(model, prompter, [s for _, s in part], new_tokens=new_tokens, limit=sequence_length)
                for (index, sample), answer in zip(part, answers, strict=True):
                    score, truth = _score(sample, answer)
                    scores.append(score)
                    predictions.append(
                        {
                            "index": index,
                            "question": sample.question,
                            "prediction": answer,
                            "truth": truth,
                            "score": score,
                        }
                        | ({"kind": sample.kind} if sample.kind is not None else {})
                    )
                task.advance(len(part))
    finally:
        model.train(was_training)
    value, stderr = mean_and_stderr(scores)
    groups: dict[str, list[float]] = {}
    for record in predictions:
        if "kind" in record:
            groups.setdefault(record["kind"], []).append(record["score"])
    settings = {
        "data": reader.source if data is not None else "the bundled test set",
        "rule": "vqa soft accuracy" if "answers" in reader.columns else "exact match after VQA normalisation",
        "prompt_template": prompt_template,
        "max_new_tokens": new_tokens,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "skipped": reader.skipped,
    }
    by_group = {kind: mean_and_stderr(group)[0] for kind, group in sorted(groups.items())} or None
    return TaskResult("vqa", "accuracy", value, stderr, len(scores), settings, by_group, predictions)


def _bundled() -> Path:
    from ecoflap import demo  # imported late: only runs on the embedded model need it

    return Path(demo.test_path())


def _chunks(reader: SampleReader, size: int) -> Iterator[list[tuple[int, Sample]]]:
    samples = iter(reader)
    while part := list(islice(samples, size)):
        yield part


def _score(sample: Sample, answer: str) -> tuple[float, str]:
    if sample.answers is not None:
        return soft_accuracy(answer, sample.answers), sample.text or sample.answers[0]
    return exact_match(answer, sample.text or ""), sample.text or ""
