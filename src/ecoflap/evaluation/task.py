"""What all tasks share: opening the test data, reading it in chunks with progress, pictures to tensors.

What every evaluation task returns, and the standard error of a mean.

An evaluation shared by several workers: batch by batch in turn, the results in the order of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from ecoflap.data.prompts import image_processor_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.workers import Workers

BUNDLED = "the bundled test set"  # as settings call it
Chunk = list[tuple[int, Sample]]  # (row of the source, sample)


def open_data(
    task: str,
    data: str | Path | None,
    *,
    samples: int | None,
    seed: int,
    batch_size: int,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    image_folder: str | Path | None = None,
) -> SampleReader:
    """The reader of a task's test data: ``samples`` drawn with ``seed``, or all in the order of the file.

    Raises:
        InvalidOption: no data, or a batch size below 1.
        CalibrationError: as :func:`ecoflap.data.load_samples`.
    """
    check_batch_size(batch_size)
    if data is None:
        raise InvalidOption(f"task '{task}' needs data: give --test SOURCE")
    return SampleReader(
        data,
        samples=samples,
        seed=seed,
        columns=columns,
        prompt_template=prompt_template,
        image_folder=image_folder,
    )


def bundled_questions() -> Path:
    """The test questions that come with the embedded model."""
    from ecoflap.data import embedded  # imported late: only runs on the embedded model need it

    return Path(embedded.test_path())


def check_batch_size(batch_size: int) -> None:
    """Raises InvalidOption if it is below 1."""
    if batch_size < 1:
        raise InvalidOption(f"the batch size must be at least 1, not {batch_size}")


def in_chunks(reader: SampleReader, size: int, progress: Progress | None, stage: str) -> Iterator[Chunk]:
    """The reader's samples in lists of ``size`` (the last may be shorter), each counted once the caller is done."""
    samples = iter(reader)
    with (progress or Silent()).stage(stage, total=len(reader)) as task:
        while part := list(islice(samples, size)):
            yield part
            task.advance(len(part))


def pictures(part: Chunk, task: str, source: str) -> list[Image.Image]:
    """The first picture of each sample.

    Raises:
        CalibrationError: a sample has none.
    """
    found = []
    for index, sample in part:
        if sample.image is None:
            raise CalibrationError(f"{source} has no picture in row {index}: task '{task}' needs one with every sample")
        found.append(sample.image)
    return found


def image_inputs(processor: Any, images: Sequence[Image.Image], task: str) -> dict[str, Any]:
    """What the checkpoint's image processor makes of ``images``, as tensors with one row each.

    Raises:
        InvalidOption: the checkpoint has no image processor.
    """
    half = image_processor_of(processor)
    if half is None:
        raise InvalidOption(f"task '{task}' needs pictures, but the checkpoint has no image processor")
    return dict(half(images=list(images), return_tensors="pt"))


def common_settings(
    reader: SampleReader, *, samples: int | None, seed: int, batch_size: int, **more: Any
) -> dict[str, Any]:
    """The settings that each result carries, with the task's own ones in front; asked for after the last sample."""
    return {
        "data": reader.source,
        **more,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "skipped": reader.skipped,
    }


def captions_of(index: int, sample: Sample, task: str, source: str) -> list[str]:
    """The captions of a sample's picture, at least one.

    Raises:
        CalibrationError: it has none.
    """
    found = [text for text in sample.captions or (sample.text,) if text]
    if not found:
        raise CalibrationError(f"{source} has no caption in row {index}: task '{task}' needs one with every picture")
    return found


def check_finite(values: torch.Tensor, what: str, source: str) -> None:
    """Raises NonFiniteLoss if any of ``values`` is NaN or infinite: ranks of such would be good by accident."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteLoss(f"{what} of {source} is not finite: the model is broken, or needs float32")


@dataclass(frozen=True)
class Measured:
    """A value in its metric's own unit, with its standard error; None where there is one observation alone."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One measured quality.

    ``value`` is in the metric's own unit (accuracy in 0..1, perplexity); ``stderr`` its standard error, None when
    there is one observation alone; ``n`` the number of observations (questions, scored tokens); ``predictions`` one
    record a question, for the report; ``others`` further metrics of the same task by name (IR@5, SPICE).
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    by_group: dict[str, float] | None = None
    predictions: list[dict[str, Any]] | None = None
    others: dict[str, Measured] = field(default_factory=dict)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and s/√n with the sample deviation s (n − 1); for 0/1 values that is √(p(1−p)/(n−1))."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def measured(values: Sequence[float]) -> Measured:
    """:func:`mean_and_stderr` of ``values`` as one object."""
    return Measured(*mean_and_stderr(values))


T = TypeVar("T")


class Shared(Generic[T]):
    """Results that come one by one, each made by one worker and known to all in the end.

    All workers go through the same data and call :meth:`add` as often; what a worker does not make itself it skips.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self._count = workers, 0
        self._own: list[T] = []

    def add(self, work: Callable[[], T]) -> None:
        """The next result, made by ``work`` where it is this worker's turn.

        It is of dicts, lists, strings, numbers and tensors, see :class:`ecoflap.support.workers.Workers`.
        """
        if self._count % self._workers.count == self._workers.rank:
            self._own.append(work())
        self._count += 1

    def all(self) -> list[T]:
        """The results of all workers, in the order of the calls of :meth:`add`; tensors lie on the CPU."""
        told = self._workers.gather(self._own)
        return [told[number % len(told)][number // len(told)] for number in range(self._count)]
