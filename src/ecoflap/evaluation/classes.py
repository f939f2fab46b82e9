"""Shared parts of the classification tasks: the classes of a data set, the class of a sample, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ecoflap.data.encode import class_number, label_of, numbers_by_name
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.retrieval import ranks
from ecoflap.evaluation.task import Chunk, Shared, TaskResult, TestData, check_finite, in_chunks, measured

DEPTH = 5  # of the second metric, if there are more classes


def own_classes(reader: SampleReader, data: str | Path) -> tuple[str, ...]:
    """Names of all classes of a data set: its own list, or else the distinct labels of all its rows, sorted.

    Raises:
        CalibrationError: it has no labels.
    """
    if reader.classes is not None:
        return reader.classes
    column = reader.columns.get("label") or reader.columns.get("text")
    if column is None:
        raise CalibrationError(f"{reader.source} has no column with classes: name it as column label")
    # Read as text, without decoding images.
    every = SampleReader(data, samples=None, seed=0, columns={"image": "", "text": column})
    return tuple(sorted({sample.text for _, sample in every if sample.text}))


def numbers_of(names: Sequence[str], own: Sequence[str]) -> dict[str, int]:
    """Class numbers by label in lower case: of ``names``, and of the data set's own names if they are as many.

    So names for prompts ("tench") match the data set's labels ("n01440764").
    """
    return numbers_by_name(names) | (numbers_by_name(own) if len(own) == len(names) else {})


def labels_of(part: Chunk, numbers: Mapping[str, int], task: str, source: str, whose: str = "given") -> torch.Tensor:
    """Class numbers ``[B]`` of samples.

    Raises:
        CalibrationError: a sample has no label, or one that is none of the classes.
    """
    return torch.tensor([class_number(label, numbers, source, whose) for label in label_names(part, task, source)])


def label_names(part: Chunk, task: str, source: str) -> list[str]:
    """The label of each sample; raises CalibrationError if one has none."""
    found = []
    for index, sample in part:
        label = label_of(sample)
        if label is None:
            raise CalibrationError(f"{source} has no class in row {index}: task '{task}' needs one with every image")
        found.append(label)
    return found


@dataclass
class TopClasses:
    """The predictions of a classification task, and the rank of each right class."""

    task: str
    names: Sequence[str]
    ranks: list[int] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def classify(
        self,
        reader: SampleReader,
        test: TestData,
        labels_of: Callable[[Chunk], torch.Tensor],
        scores_of: Callable[[Chunk], torch.Tensor],
    ) -> None:
        """Classify all samples of ``reader``; several workers share them.

        A wrong class with the same score as the right one is ranked before it.

        Args:
            labels_of: class numbers ``[B]`` of a batch.
            scores_of: scores of the classes ``[B, C]`` of a batch.

        Raises:
            NonFiniteLoss: a score is NaN or infinite.
        """
        collected: Shared[dict[str, list[int]]] = Shared(test.workers)
        truths: list[tuple[int, int]] = []  # row and class number

        def ranked(part: Chunk, labels: torch.Tensor) -> dict[str, list[int]]:
            scores = scores_of(part)
            check_finite(scores, "the score of a class", reader.source)
            right = labels[:, None] == torch.arange(scores.shape[1])[None]
            return {"best": scores.argmax(1).tolist(), "ranks": ranks(scores, right).tolist()}

        for part in in_chunks(reader, test.batch_size, test.progress, self.task):
            labels = labels_of(part)
            truths += zip((index for index, _ in part), labels.tolist(), strict=True)
            collected.add(partial(ranked, part, labels))
        graded = [pair for found in collected.all() for pair in zip(found["best"], found["ranks"], strict=True)]
        for (row, label), (best, rank) in zip(truths, graded, strict=True):
            self.ranks.append(rank)
            self.predictions.append(
                {"index": row, "prediction": self._name(best), "truth": self._name(label), "score": float(rank < 1)}
            )

    def result(self, settings: dict[str, Any]) -> TaskResult:
        """Top-1 accuracy, and top-5 if there are more than five classes."""
        first = measured([float(rank < 1) for rank in self.ranks])
        depth = measured([float(rank < DEPTH) for rank in self.ranks])
        others = {f"top-{DEPTH} accuracy": depth} if len(self.names) > DEPTH else {}
        metric, settings = "top-1 accuracy", {"classes": len(self.names), **settings}
        count = len(self.ranks)
        return TaskResult(
            self.task, metric, first.value, first.stderr, count, settings, predictions=self.predictions, others=others
        )

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else str(number)


def check_classes(names: Sequence[str], task: str, source: str) -> None:
    """Raises InvalidOption if there are fewer than two classes."""
    if len(names) < 2:
        raise InvalidOption(
            f"{source} has {len(names)} classes, and task '{task}' needs at least 2: give --classes FILE"
        )
