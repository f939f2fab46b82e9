"""Makes batches of samples with the checkpoint's own processor: on the CPU, made once, with labels for the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ecoflap.data.collate import PAIRED, Collate, collating_objective, objective_collator, unpacked
from ecoflap.data.encode import (
    encode_classified,
    encode_continued,
    encode_targets,
    with_instruction_alone,
    with_own_start,
)
from ecoflap.data.model_facts import Batch, batch_size_of, is_dual_tower, is_encoder_decoder, needs_image, takes_images
from ecoflap.data.packing import check_length, draw_windows, tokenize_corpus
from ecoflap.data.prompts import ProcessorRefused, Prompter, image_processor_of, tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleSet
from ecoflap.data.window_length import Work, default_length
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.support.text import first_line


def as_batches(batches: Iterable[Any], loss: object | None) -> Sequence[Any]:
    """Collect the batches in a list; a ``DataLoader`` or a generator is read once.

    Raises:
        CalibrationError: a batch is no mapping, and there is no ``loss`` that could take it.
    """
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise CalibrationError(f"batches is a {type(batches).__name__}: give a list of batches, or a DataLoader")
    found = batches if isinstance(batches, Sequence) else list(batches)
    for number, batch in enumerate(found if loss is None else ()):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"batch {number} is a {type(batch).__name__}: give mappings of the arguments of the model's forward, "
                "such as {'input_ids': ..., 'labels': ...}, or a loss(model, batch) that takes it"
            )
    return found


def first_samples(batches: Sequence[Any], samples: int | None) -> Sequence[Any]:
    """The first whole batches with at least ``samples`` samples; all batches if they have fewer, or for None.

    Raises:
        CalibrationError: there are no batches.
        InvalidOption: ``samples`` is below 1.
    """
    if not len(batches):
        raise CalibrationError("no calibration batches: give at least one")
    if samples is None:
        return batches
    if samples < 1:
        raise InvalidOption(f"samples must be at least 1, not {samples}")
    count = 0
    for number, batch in enumerate(batches, 1):
        count += batch_size_of(batch)
        if count >= samples:
            return batches[:number]
    return batches


def warn_if_fewer(batches: Sequence[Any], samples: int | None) -> None:
    """Warn if :func:`first_samples` takes all since there are fewer; raises as it does."""
    count = sum(batch_size_of(batch) for batch in first_samples(batches, samples))
    if samples is not None and count < samples:
        warnings.warn(f"all {count} calibration samples are used: there are fewer than {samples}", stacklevel=2)


__all__ = ["Batch", "batch_size_of", "make_batches"]


def make_batches(
    sample_set: SampleSet,
    model: nn.Module,
    processor: Any,
    *,
    batch_size: int,
    sequence_length: int | None = None,
    seed: int = 0,
    objective: str | None = None,
    classes: Sequence[str] | None = None,
    class_prompts: Sequence[str] | None = None,
    window_start: str = "each",
    told: Callable[[str], None] | None = None,
    trained: bool = False,
) -> list[Batch]:
    """Batches ready for the objective, in the order of the samples, all on the CPU.

    The keys of a batch depend on the objective, the model and the processor:

    - plain text, packed: ``input_ids``, ``attention_mask``, ``labels`` ``[B, sequence_length]``; for an encoder-decoder
      the first half of each window is the prefix and the second half the target. Classifiers of texts get rows.
    - prompt or image with an answer or caption, decoder only: prompt and answer in ``input_ids``; ``labels`` are -100
      on prompt, image and padding.
    - the same, encoder-decoder: the prompt (or the caption's prefix, cut at a seeded word) in ``input_ids``, the target
      (or suffix) in ``labels``, -100 on padding.
    - two towers: texts and images, for ``itm-itc`` with hard negatives that the current model chooses; for
      ``zero-shot`` the prompts of all classes, one tensor shared by all batches, and ``labels`` ``[B]``.
    - classifiers: ``pixel_values`` of one image or several, the text if they read one, class ``labels`` ``[B]``.

    Args:
        batch_size: samples in a batch; the last may be smaller.
        sequence_length: tokens in a window of plain text, by default a length that fits model, machine and text; for
            other data the longest text allowed.
        seed: of windows and caption cuts.
        objective: name of the loss that the batches are for; None for the model's default.
        classes: names of the classes of ``zero-shot``; None for the data set's own.
        class_prompts: templates with ``{}`` for the class name; None for "a photo of a {}.".
        window_start: of plain text: "each" window begins with the tokenizer's special tokens, or "once" the whole text.
        told: receives the reason for the length of windows, if ``sequence_length`` is None.
        trained: the batches are for training, which needs more memory: windows of the default length may be shorter.

    Raises:
        CalibrationError: the data does not fit the model (no image, no text, too long, unknown class).
        InvalidOption: a class prompt without ``{}``.
    """
    if batch_size < 1:
        raise CalibrationError(f"the batch size must be at least 1, not {batch_size}")
    name, sample_set = _as_wanted(sample_set, model, processor, objective)
    if sample_set.windows is not None:
        work: Work = "training" if trained else "calibration"
        return _packed(sample_set, model, processor, batch_size, sequence_length, seed, window_start, told, work)
    samples = list(sample_set.samples)
    collate = make_collator(
        sample_set, model, processor, sequence_length=sequence_length, seed=seed, objective=objective,
        classes=classes, class_prompts=class_prompts,
    )  # fmt: skip
    groups = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    if name in PAIRED and len(groups[-1]) == 1:  # the loss of a single pair is always 0
        if len(groups) == 1 or batch_size == 1:
            raise CalibrationError("a contrastive loss needs at least 2 samples in a batch: raise the batch size")
        groups[-2:] = [range(groups[-2].start, groups[-1].stop)]
    return [collate([samples[i] for i in group], group.start) for group in groups]


def _as_wanted(sample_set: SampleSet, model: nn.Module, processor: Any, objective: str | None) -> tuple[str, SampleSet]:
    """The objective that decides the form of the batches, and the samples for it: rows, or text to be packed."""
    if processor is None:
        raise CalibrationError("the checkpoint has no processor or tokenizer, so samples cannot be turned into batches")
    name = collating_objective(objective, model)
    return name, unpacked(sample_set, name, processor)


def make_collator(
    sample_set: SampleSet,
    model: nn.Module,
    processor: Any,
    *,
    sequence_length: int | None = None,
    seed: int = 0,
    objective: str | None = None,
    classes: Sequence[str] | None = None,
    class_prompts: Sequence[str] | None = None,
) -> Collate:
    """A function that makes a batch, as in :func:`make_batches`, from samples of the set and a seed for their cuts.

    Raises:
        CalibrationError: as :func:`make_batches`; or the set is plain text, which is cut into windows instead.
        InvalidOption: a class prompt without ``{}``.
    """
    name, sample_set = _as_wanted(sample_set, model, processor, objective)
    samples = list(sample_set.samples)
    if sample_set.windows is not None or not samples:
        raise CalibrationError(f"{sample_set.source} gave no samples")
    own_classes = getattr(sample_set, "classes", None)
    collate = objective_collator(
        name, samples, model, processor, sample_set.source,
        classes=classes, own_classes=own_classes, class_prompts=class_prompts,
    ) or _collator(samples, model, processor, sequence_length, seed, sample_set.source)  # fmt: skip
    return lambda part, start: dict(_tidy(collate(part, start)))


def _collator(
    samples: Sequence[Sample], model: nn.Module, processor: Any, length: int | None, seed: int, source: str
) -> Collate:
    sees = image_processor_of(processor) is not None
    has_images = samples[0].image is not None
    if sees and not has_images and (needs_image(model) or is_dual_tower(model) or tokenizer_of(processor) is None):
        raise CalibrationError(f"{source} has no images, but {type(model).__name__} needs them: give an image column")
    if not sees and has_images and takes_images(model):
        raise CalibrationError(
            f"{type(model).__name__} takes images, but its checkpoint gave only a tokenizer, so those of {source} "
            "cannot be used: its processor is missing, or needs a package that is not installed"
        )
    if not sees:  # a text model on image data: the text is still usable
        samples = [replace(sample, images=()) for sample in samples]
    if tokenizer_of(processor) is None:
        return lambda part, start: encode_classified(part, model, processor, source)
    if samples[0].text is None:
        raise CalibrationError(
            f"{source} has no answers or captions, but {type(model).__name__} needs text for its loss"
        )
    prompter = Prompter(model, processor)

    def collate(part: list[Sample], start: int) -> dict[str, Any]:
        shown = part if sees else _without_their_pictures(part)
        if is_encoder_decoder(model):
            return _limited(encode_targets(shown, prompter, start, seed), length, source)
        encoded = encode_continued(shown, prompter)
        encoded["input_ids"] = with_own_start(encoded["input_ids"], model, prompter.tokenizer)
        prompts = [prompter.render(sample) for sample in shown]
        return _limited(with_instruction_alone(encoded, prompts, processor), length, source)

    def explained(part: list[Sample], start: int) -> dict[str, Any]:
        try:
            return collate(part, start)
        except (ProcessorRefused, ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, ProcessorRefused) else None
            reason = first_line(cause or error)
            last = start + len(part) - 1
            raise CalibrationError(
                f"{source}: the checkpoint's processor can't take samples {start} to {last} ({reason}): check their "
                "images and texts"
            ) from error

    return explained


def _without_their_pictures(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, images=()) for sample in samples]


def _packed(
    sample_set: SampleSet,
    model: nn.Module,
    processor: Any,
    batch_size: int,
    length: int | None,
    seed: int,
    window_start: str,
    told: Callable[[str], None] | None,
    work: Work,
) -> list[Batch]:
    tokenizer = tokenizer_of(processor)
    if tokenizer is None or needs_image(model):
        raise CalibrationError(f"{sample_set.source} is plain text, but {type(model).__name__} needs images")
    check_length(model, length)
    count = None if sample_set.windows == -1 else sample_set.windows
    corpus = tokenize_corpus(sample_set, tokenizer)
    size = length
    if size is None:
        chosen = default_length(model, tokenizer, len(corpus), count or 1, batch_size, work=work)
        size = chosen.tokens
        if told is not None:
            told(chosen.reason)
    windows = draw_windows(corpus, size, count, seed, sample_set.source, window_start)
    batches: list[Batch] = []
    for chunk in torch.split(windows, batch_size):
        ids, labels = (chunk[:, : size // 2], chunk[:, size // 2 :]) if is_encoder_decoder(model) else (chunk, chunk)
        ids = ids.contiguous()
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.clone()})
    return batches


def _limited(encoded: dict[str, Any], length: int | None, source: str) -> dict[str, Any]:
    longest = max(encoded["input_ids"].shape[1], encoded["labels"].shape[1])
    if length is not None and longest > length:
        raise CalibrationError(
            f"{source}: a sample has {longest} tokens, more than the sequence length of {length}: raise it or shorten "
            "the sample"
        )
    return encoded


def _tidy(encoded: dict[str, Any]) -> Batch:
    return {name: value.contiguous() for name, value in encoded.items() if isinstance(value, torch.Tensor)}
