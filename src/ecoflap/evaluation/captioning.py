"""Captioning: a caption for each picture, scored by CIDEr and SPICE against the captions that people wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.prompts import Prompter, image_processor_of
from ecoflap.calibration.sample import Sample
from ecoflap.errors import InvalidOption
from ecoflap.evaluation import caption_scores
from ecoflap.evaluation.common import captions_of, common_settings, in_chunks, open_data, pictures
from ecoflap.evaluation.generate import generate
from ecoflap.evaluation.results import TaskResult, measured
from ecoflap.evaluation.shared import Shared
from ecoflap.network.trace import evaluating
from ecoflap.progress import Progress
from ecoflap.workers import ALONE, Workers

MAX_NEW_TOKENS = 30  # of a caption: BLIP-2's published setting for COCO
CHAT_PROMPT = "Describe the image in one short sentence."  # a chat has to be asked; other models just begin


@dataclass
class _Picture:
    """A picture's row, its references, and what the model says."""

    index: int
    references: list[str]
    said: str = ""


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
    image_folder: str | Path | None = None,
    prompt: str | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    min_tokens: int = 0,
    new_tokens: int = MAX_NEW_TOKENS,
    metrics: str = "CIDEr,SPICE",
    tokenizer: str = "ptb",
) -> TaskResult:
    """CIDEr (0..10) and SPICE (0..1) of the model's captions, each the mean over pictures.

    The standard errors are over pictures, with CIDEr's word weights taken as given. With several rows of one picture
    (``Sample.group``) it is captioned once, and all their captions are its references.

    Args:
        data: pictures with one or several captions each.
        samples: rows drawn with ``seed``; None for all.
        prompt: what the caption continues or answers ("a photo of"); by default the data's own, nothing without one,
            and for a chat model "Describe the image in one short sentence."
        beams, length_penalty, min_tokens, new_tokens: as :func:`ecoflap.evaluation.generate.generate`. A caption ends
            with its line.
        metrics: ``CIDEr``, ``SPICE`` or both with a comma between; the first of this order is the result's value.
        tokenizer: ``ptb``, as the COCO evaluation does it in Java; or ``simple``, lower-case words without Java, whose
            results are labelled so, as they do not compare with published ones.

    Raises:
        InvalidOption: the model cannot generate or has no image processor.
        MissingDependency: the extra ``captions``, Java or SPICE's models are missing.
        CalibrationError: no pictures, or no captions.
    """
    names = caption_scores.wanted(metrics)
    if not callable(getattr(model, "generate", None)) or image_processor_of(processor) is None:
        raise InvalidOption("task 'captioning' needs a model that generates text from pictures, and its processor")
    reader = open_data(
        "captioning",
        data,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        columns=columns,
        image_folder=image_folder,
    )
    caption_scores.check(names, tokenizer)
    prompter = Prompter(model, processor)
    decoding: dict[str, Any] = {
        "new_tokens": new_tokens,
        "beams": beams,
        "length_penalty": length_penalty,
        "min_tokens": min_tokens,
    }
    found: dict[str, _Picture] = {}
    told: Shared[list[str]] = Shared(workers)
    with evaluating(model):
        for part in in_chunks(reader, batch_size, progress, "captioning"):
            pictures(part, "captioning", reader.source)
            fresh: list[tuple[_Picture, Sample]] = []
            for index, sample in part:
                key = f"row {index}" if sample.group is None else f"group {sample.group}"
                if key not in found:
                    found[key] = _Picture(index, [])
                    fresh.append((found[key], replace(sample, prompt=_prompt(prompt, sample, prompter))))
                found[key].references += captions_of(index, sample, "captioning", reader.source)
            asked = [sample for _, sample in fresh]
            told.add(partial(generate, model, prompter, asked, limit=sequence_length, **decoding))
    shown = list(found.values())
    for picture, text in zip(shown, (text for of_part in told.all() for text in of_part), strict=True):
        picture.said = text.partition("\n")[0].strip()
    scores = _scores(names, tokenizer, shown)
    values = {_label(name, tokenizer): measured(of_all) for name, of_all in scores.items()}
    first, *others = values
    predictions = [
        {"index": p.index, "prediction": p.said, "truth": p.references}
        | {"score" if i == 0 else name: of_all[row] for i, (name, of_all) in enumerate(scores.items())}
        for row, p in enumerate(shown)
    ]
    settings = common_settings(
        reader, samples=samples, seed=seed, batch_size=batch_size, prompt=prompt, **decoding, tokenizer=tokenizer
    )
    return TaskResult(
        "captioning",
        first,
        values[first].value,
        values[first].stderr,
        len(shown),
        settings,
        predictions=predictions,
        others={name: values[name] for name in others},
    )


def _prompt(given: str | None, sample: Sample, prompter: Prompter) -> str:
    if given is not None:
        return given
    return sample.prompt or (CHAT_PROMPT if prompter.is_chat else "")


def _label(metric: str, tokenizer: str) -> str:
    return metric if tokenizer == "ptb" else f"{metric} ({tokenizer} words)"


def _scores(names: list[str], tokenizer: str, shown: list[_Picture]) -> dict[str, list[float]]:
    tokenize = caption_scores.tokenize_with(tokenizer)
    said = [of_one[0] for of_one in tokenize([[picture.said] for picture in shown])]
    truth = tokenize([picture.references for picture in shown])
    functions = {"CIDEr": caption_scores.cider, "SPICE": caption_scores.spice}
    return {name: functions[name](said, truth) for name in names}
