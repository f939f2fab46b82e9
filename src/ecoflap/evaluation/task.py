"""Defines a task and its result, and what all tasks share: test data in chunks, standard errors, several workers."""

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

BUNDLED = "the bundled test set"  # as settings call it
Chunk = list[tuple[int, Sample]]  # (row of the source, sample)


Unit = Literal["", "%", "points"]
Better = Literal["more", "less"]


@dataclass(frozen=True)
class TestData:
    """What a model is tested on, and how: what a recipe says of a test beside the task's own options.

    Attributes:
        data: any source of :func:`ecoflap.data.load_samples`; None where the task has data of its own.
        samples: how many, drawn with ``seed``; None for all.
        batch_size: samples of one forward.
        sequence_length: most tokens of a sequence; None for no limit, or the model's.
        columns, prompt_template, image_folder: as for calibration; None for what the data says itself.
        window_start: of plain text: ``each`` window begins with the tokenizer's special tokens, or ``once`` the whole
            text, as in the published code of SparseGPT and Wanda.
        classes: names of the classes.
        class_prompts: templates with ``{}`` for a class's name.
        progress: where to report.
        workers: processes that share the samples.
    """

    __test__: ClassVar[bool] = False  # no test of pytest's

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
    """Base of all tasks. A subclass is a frozen dataclass: its fields are its options, its class attributes say more.

    Attributes:
        unit: of all its metrics: ``%``, a share of 1 that is shown in per cent; ``points``, by custom shown times 100;
            "" for the plain number.
        better: whether ``more`` or ``less`` of its metrics is better.
        hub_type: the Hub's name of the kind of task, for the model card.
        takes: which of ``columns``, ``prompt_template``, ``image_folder``, ``classes`` and ``class_prompts`` it reads;
            the others are refused.
        needs_pictures: whether every sample must have one.
    """

    unit: ClassVar[Unit | None] = ""
    better: ClassVar[Better | None] = "more"
    hub_type: ClassVar[str] = "text-generation"
    takes: ClassVar[tuple[str, ...]] = ()
    needs_pictures: ClassVar[bool] = False

    def check_source(self, reader: SampleReader) -> None:
        """Raises CalibrationError where the columns of the data tell that this task can't use it: before any model."""
        if self.needs_pictures and not reader.columns.keys() & {"image", "messages"}:
            raise CalibrationError(
                f"{reader.source} has no pictures, which the task needs: it was read as {read_as(reader)}"
            )

    @abstractmethod
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """Measure ``model``, which is on its device and is left in the mode (train or eval) that it came in.

        Args:
            processor: the checkpoint's; None where there is none.

        Raises:
            InvalidOption: the task is not for this model, or an option is out of range.
            CalibrationError: the data is not for this task.
            NonFiniteLoss: what is measured is NaN or infinite.
        """


def open_data(task: str, test: TestData) -> SampleReader:
    """The reader of a task's test data: the samples drawn with the seed, or all in the order of the file.

    Raises:
        InvalidOption: no data, or a batch size below 1.
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
    from ecoflap.support import embedded  # imported late: only runs on the embedded model need it

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


def read_as(reader: SampleReader) -> str:
    """What the columns of the data were taken for, for messages."""
    return ", ".join(f"{role}={column}" for role, column in reader.columns.items()) or "plain text"


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


def common_settings(reader: SampleReader, test: TestData, **more: Any) -> dict[str, Any]:
    """The settings that each result carries, with the task's own ones in front; asked for after the last sample."""
    return {
        "data": reader.source,
        **more,
        "samples": test.samples,
        "seed": test.seed,
        "batch_size": test.batch_size,
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
    """A value in its metric's own unit, with its standard error; None where there is one observation alone.

    ``scores``: of each sample, where the value is their mean and more is better.
    """

    value: float
    stderr: float | None = None
    scores: list[float] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Group:
    """How sure the value of a group of samples is: their number, and the value's standard error (None: not known)."""

    n: int
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One measured quality.

    ``value`` is in the metric's own unit (accuracy in 0..1, perplexity); ``stderr`` its standard error, None when
    there is one observation alone; ``n`` the number of observations (questions, scored tokens); ``predictions`` one
    record a question, for the report; ``others`` further metrics of the same task by name (IR@5, SPICE).
    ``groups`` says how many samples are behind each value of ``by_group``, and its error. ``unit``,
    ``better`` and ``hub_type`` are the task's, set by who runs it; None: each metric's, by its name. ``losses``: mean
    negative log-likelihood of each window or answer, where the value is exp of their mean; ``tokens``: how many tokens
    of each were scored, where they differ, and weigh it; ``scores``: of each sample, where there are neither
    predictions nor losses, the value is their mean and more is better; ``kinds``: the group of each loss or score.
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
        gathered = self._workers.gather(self._own)
        return [gathered[number % len(gathered)][number // len(gathered)] for number in range(self._count)]
