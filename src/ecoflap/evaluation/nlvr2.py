"""NLVR2: whether a sentence about two images is true, by a classifier of two images or a generating model.

Source: Suhr et al., "A Corpus for Reasoning About Natural Language Grounded in Photographs", ACL 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ecoflap.data.encode import encode_classified, sentence_of
from ecoflap.data.model_facts import parameters_of, to_device
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.likelihood import answer_likelihoods
from ecoflap.evaluation.task import (
    Chunk,
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    check_finite,
    common_settings,
    in_chunks,
    measured,
    open_data,
)
from ecoflap.model.trace import evaluating

TEMPLATE = 'Look at the two images. Is this statement true or false? "{question}" Answer:'
ANSWERS = ("false", "true")  # by their number in published NLVR2 checkpoints
_TRUTH = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}
Score = Callable[[list[Sample]], torch.Tensor]  # samples -> scores [B, 2] of false and true


@dataclass(frozen=True)
class Nlvr2(Task):
    """Share of sentences whose truth is predicted correctly.

    A classifier (ViLT for NLVR2) decides by its logits. A generating model decides by which of the answers "True" and
    "False" has the higher log-likelihood, its end token included; equal ones count as wrong.

    Data: two images, a sentence and a label (true or false) each. The prompt template is for a generating model, with
    ``{question}`` for the sentence. The sequence length is the most tokens of a prompt with its answer; classifiers cut
    their sentences.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "visual-question-answering"
    takes: ClassVar[tuple[str, ...]] = ("columns", "prompt_template", "image_folder")

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: the model does not take two images, neither as a classifier nor in a prompt.
            CalibrationError: a sample lacks two images or a sentence, or has another label than true or false.
            NonFiniteLoss: a score is NaN or infinite.
        """
        template = TEMPLATE if test.prompt_template is None else test.prompt_template
        reader = open_data("nlvr2", replace(test, prompt_template=template))
        score, how = _scores(model, processor, reader.source, template, test.sequence_length)
        predictions: list[dict[str, Any]] = []
        collected: Shared[torch.Tensor] = Shared(test.workers)
        parts: list[list[tuple[int, str | None, int]]] = []
        with evaluating(model):
            for part in in_chunks(reader, test.batch_size, test.progress, "nlvr2"):
                truths = [_truth(index, sample, reader.source) for index, sample in part]
                _check_pictures(part, reader.source)
                parts.append([(index, sentence_of(s), truth) for (index, s), truth in zip(part, truths, strict=True)])
                collected.add(partial(score, [sample for _, sample in part]))
        for of_part, scores in zip(parts, collected.all(), strict=True):
            check_finite(scores, "the score of an answer", reader.source)
            for (index, sentence, truth), (false, true) in zip(of_part, scores.tolist(), strict=True):
                right = true > false if truth else false > true
                predictions.append({
                    "index": index,
                    "question": sentence,
                    "prediction": ANSWERS[true > false],
                    "truth": ANSWERS[truth],
                    "score": float(right),
                })  # fmt: skip
        found = measured([record["score"] for record in predictions])
        settings = common_settings(reader, test, answers=how)
        settings |= {} if how == "classifier" else {"prompt_template": template}
        return TaskResult(
            "nlvr2", "accuracy", found.value, found.stderr, len(predictions), settings, predictions=predictions
        )


def _scores(model: nn.Module, processor: Any, source: str, template: str, length: int | None) -> tuple[Score, str]:
    """The function that scores both answers, and its name for the settings."""
    parameters = parameters_of(model)
    pictures = getattr(getattr(model, "config", None), "num_images", None)
    if "Classification" in type(model).__name__ and pictures == 2 and "pixel_values" in parameters:
        return partial(_classified, model, processor, source), "classifier"
    if callable(getattr(model, "generate", None)) and processor is not None and "pixel_values" in parameters:
        return partial(_answered, model, processor, source, template, length), "log-likelihood"
    raise InvalidOption(
        f"task 'nlvr2' needs a classifier of two images or a model that answers about them, not {type(model).__name__}"
    )


def _classified(model: nn.Module, processor: Any, source: str, samples: list[Sample]) -> torch.Tensor:
    names = {str(name).lower(): int(number) for name, number in model.config.label2id.items()}  # type: ignore[union-attr, operator]
    true = names.get("true", names.get("yes", 1))
    numbered = [replace(sample, label=str(true)) for sample in samples]  # the logits don't depend on the label
    inputs = encode_classified(numbered, model, processor, source)
    inputs.pop("labels")
    logits = model(**to_device(inputs, model)).logits.float().cpu()
    return torch.stack([logits[:, 1 - true], logits[:, true]], dim=1)


def _answered(
    model: nn.Module, processor: Any, source: str, template: str, length: int | None, samples: list[Sample]
) -> torch.Tensor:
    asked = []
    for sample in samples:
        prompt = template.replace("{question}", sentence_of(sample) or "")
        plain = replace(sample, prompt=prompt, question=None, messages=None, captions=None, label=None)
        asked += [replace(plain, text=answer.capitalize()) for answer in ANSWERS]
    return answer_likelihoods(model, processor, asked, source, length).total.view(-1, len(ANSWERS))


def _truth(index: int, sample: Sample, source: str) -> int:
    label = (sample.label if sample.label is not None else sample.text or "").strip().lower()
    if label not in _TRUTH:
        raise CalibrationError(f"{source}: the label '{label}' in row {index} is neither true nor false")
    return _TRUTH[label]


def _check_pictures(part: Chunk, source: str) -> None:
    for index, sample in part:
        if len(sample.images) != 2 or not sentence_of(sample):
            found = f"{len(sample.images)} images" + ("" if sentence_of(sample) else " and no sentence")
            raise CalibrationError(
                f"{source}: row {index} has {found}: task 'nlvr2' needs two images and a sentence with every row"
            )
