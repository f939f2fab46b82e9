"""Defines a task and its result, with helpers of all tasks: test data in batches, standard errors, workers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from PIL import Image
from torch import nn

from ecoflap.data.prompts import image_processor_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.workers import ALONE, Workers

BUNDLED = "the bundled test set"  # in a result's settings
Chunk = list[tuple[int, Sample]]  # (row of the source, sample)


Unit = Literal["", "%", "points"]
Better = Literal["more", "less"]


@dataclass(frozen=True)
class TestData:
    """Test data and the settings of a test, beside the task's own options.

    Attributes:
        data: any source of :func:`ecoflap.data.load_samples`; None if the task has its own data.
        samples: number of samples, drawn with ``seed``; None for all.
        batch_size: samples in one forward.
        sequence_length: most tokens of a sequence; None for no limit, or the model's.
        columns, prompt_template, image_folder: as for calibration; None for the default.
        window_start: of plain text: ``each`` window begins with the tokenizer's special tokens, or ``once`` the whole
            text, as in the published code of SparseGPT and Wanda.
        classes: names of the classes.
        class_prompts: templates with ``{}`` for a class's name.
        progress: where to report.
        workers: processes that share the samples.
    """

    __test__: ClassVar[bool] = False  # for pytest

    data: str | Path | None = None
    samples: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    window_start: str = "each"
    seed: int = 0
    columns: Mapping[str, str] | None = None
    prompt_template: str | None = None
    image_folder: str | Path | None = None
    classes: Sequence[str] | None = None
    class_prompts: Sequence[str] | None = None
    progress: Progress = field(default_factory=Silent)
    workers: Workers = ALONE


class Task(ABC):
    """Base of all tasks. A subclass is a frozen dataclass whose fields are the task's options.

    Attributes:
        unit: of all its metrics: ``%``, a share of 1 that is shown in per cent; ``points``, shown times 100; "" for the
            plain number.
        better: whether ``more`` or ``less`` of its metrics is better.
        hub_type: the Hub's name of the kind of task, for the model card.
        takes: which of ``columns``, ``prompt_template``, ``image_folder``, ``classes`` and ``class_prompts`` it reads;
            the others are refused.
        needs_pictures: whether every sample must have an image.
    """

    unit: ClassVar[Unit | None] = ""
    better: ClassVar[Better | None] = "more"
    hub_type: ClassVar[str] = "text-generation"
    takes: ClassVar[tuple[str, ...]] = ()
    needs_pictures: ClassVar[bool] = False

    def check_source(self, reader: SampleReader) -> None:
        """Raises CalibrationError if the columns show that this task can't use the data; needs no model."""
        if self.needs_pictures and not reader.columns.keys() & {"image", "messages"}:
            raise CalibrationError(
                f"{reader.source} has no images, which the task needs: it was read as {read_as(reader)}"
            )

    @abstractmethod
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """Measure ``model``, which is on its device; its mode (train or eval) is the same afterwards.

        Args:
            processor: the checkpoint's; None if it has none.

        Raises:
            InvalidOption: the task is not for this model, or an option is out of range.
            CalibrationError: the data is not for this task.
            NonFiniteLoss: a measured value is NaN or infinite.
        """


def open_data(task: str, test: TestData) -> SampleReader:
    """The reader of a task's test data: samples drawn with the seed, or all in the order of the file.

    Raises:
        InvalidOption: there is no data, or the batch size is below 1.
        CalibrationError: as :func:`ecoflap.data.load_samples`.
    """
    check_batch_size(test.batch_size)
    if test.data is None:
        raise InvalidOption(f"task '{task}' needs data: give --test SOURCE")
    return SampleReader(
        test.data,
        samples=test.samples,
        seed=test.seed,
        columns=test.columns,
        prompt_template=test.prompt_template,
        image_folder=test.image_folder,
    )


def bundled_questions() -> Path:
    """The test questions that come with the embedded model."""
    from ecoflap.support import embedded

    return Path(embedded.test_path())


def check_batch_size(batch_size: int) -> None:
    """Raises InvalidOption if it is below 1."""
    if batch_size < 1:
        raise InvalidOption(f"the batch size must be at least 1, not {batch_size}")


def in_chunks(reader: SampleReader, size: int, progress: Progress | None, stage: str) -> Iterator[Chunk]:
    """The reader's samples in lists of ``size`` (the last may be shorter); progress counts them after their use."""
    samples = iter(reader)
    with (progress or Silent()).stage(stage, total=len(reader)) as task:
        while part := list(islice(samples, size)):
            yield part
            task.advance(len(part))


def read_as(reader: SampleReader) -> str:
    """The columns by their roles, for messages."""
    return ", ".join(f"{role}={column}" for role, column in reader.columns.items()) or "plain text"


def pictures(part: Chunk, task: str, source: str) -> list[Image.Image]:
    """The first image of each sample.

    Raises:
        CalibrationError: a sample has none.
    """
    found = []
    for index, sample in part:
        if sample.image is None:
            raise CalibrationError(f"{source} has no image in row {index}: task '{task}' needs one with every sample")
        found.append(sample.image)
    return found


def image_inputs(processor: Any, images: Sequence[Image.Image], task: str) -> dict[str, Any]:
    """The output of the checkpoint's image processor for ``images``: tensors with one row per image.

    Raises:
        InvalidOption: the checkpoint has no image processor.
    """
    half = image_processor_of(processor)
    if half is None:
        raise InvalidOption(f"task '{task}' needs images, but the checkpoint has no image processor")
    return dict(half(images=list(images), return_tensors="pt"))


def common_settings(reader: SampleReader, test: TestData, **more: Any) -> dict[str, Any]:
    """The settings of a result, with the task's own ones; to be called after the last sample."""
    return {
        "data": reader.source,
        **more,
        "samples": test.samples,
        "seed": test.seed,
        "batch_size": test.batch_size,
        "skipped": reader.skipped,
    }


def captions_of(index: int, sample: Sample, task: str, source: str) -> list[str]:
    """The captions of a sample's image, at least one.

    Raises:
        CalibrationError: it has none.
    """
    found = [text for text in sample.captions or (sample.text,) if text]
    if not found:
        raise CalibrationError(f"{source} has no caption in row {index}: task '{task}' needs one with every image")
    return found


def check_finite(values: torch.Tensor, what: str, source: str) -> None:
    """Raises NonFiniteLoss if any of ``values`` is NaN or infinite, since their ranks would be meaningless."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteLoss(f"{what} of {source} is not finite: the model is broken, or needs float32")


@dataclass(frozen=True)
class Measured:
    """A value in its metric's own unit, with its standard error (None for a single observation).

    ``scores`` are those of the samples, if the value is their mean and more is better.
    """

    value: float
    stderr: float | None = None
    scores: list[float] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Group:
    """Number of samples in a group, and the standard error of the group's value (None if it is unknown)."""

    n: int
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One measured quality.

    Attributes:
        value: in the metric's own unit (accuracy in 0..1, perplexity).
        stderr: of the value; None for a single observation.
        n: number of observations (questions, scored tokens).
        by_group, groups: the value of each group of samples; its number of samples and standard error.
        predictions: one record per question, for the report.
        others: further metrics of the same task by name (IR@5, SPICE).
        unit, better, hub_type: the task's, set by the caller; None: each metric's, by its name.
        losses: mean negative log-likelihood of each window or answer, if the value is exp of their mean.
        tokens: number of scored tokens of each loss, its weight; None if all are equal.
        scores: of each sample, if there are neither predictions nor losses, the value is their mean, and more is
            better.
        kinds: the group of each loss or score.
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
    unit: Unit | None = None
    better: Better | None = None
    hub_type: str | None = None
    losses: list[float] | None = None
    tokens: list[int] | None = None
    kinds: list[str | None] | None = None
    groups: dict[str, Group] | None = None
    scores: list[float] | None = None


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and s/√n with the sample deviation s (n − 1); for 0/1 values that is √(p(1−p)/(n−1))."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def measured(values: Sequence[float]) -> Measured:
    """:func:`mean_and_stderr` of ``values`` as one object, which keeps them."""
    return Measured(*mean_and_stderr(values), list(values))


T = TypeVar("T")


class Shared(Generic[T]):
    """A sequence of results, each computed by one worker and finally known to all.

    All workers read the same data and make the same calls of :meth:`add`, which skips the work of other workers.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self._count = workers, 0
        self._own: list[T] = []

    def add(self, work: Callable[[], T]) -> None:
        """Add the result of ``work``, which is called only if it is this worker's turn.

        It consists of dicts, lists, strings, numbers and tensors, see :class:`ecoflap.support.workers.Workers`.
        """
        if self._count % self._workers.count == self._workers.rank:
            self._own.append(work())
        self._count += 1

    def all(self) -> list[T]:
        """The results of all workers, in the order of the calls of :meth:`add`; tensors are on the CPU."""
        gathered = self._workers.gather(self._own)
        return [gathered[number % len(gathered)][number // len(gathered)] for number in range(self._count)]
