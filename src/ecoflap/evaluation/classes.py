"""Shared parts of the classification tasks: the classes of a data set, the class of a sample, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecoflap.data.encode import class_number, label_of, numbers_by_name
from ecoflap.data.samples import SampleReader
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.retrieval import ranks
from ecoflap.evaluation.task import Chunk, TaskResult, check_finite, measured

DEPTH = 5  # of the second metric, where there are more classes


def own_classes(reader: SampleReader, data: str | Path) -> tuple[str, ...]:
    """Names of all classes of a data set: as it says them itself, or else the distinct labels of all its rows, sorted.

    Raises:
        CalibrationError: it has no labels.
    """
    if reader.classes is not None:
        return reader.classes
    column = reader.columns.get("label") or reader.columns.get("text")
    if column is None:
        raise CalibrationError(f"{reader.source} has no column with classes: name it as column label")
    # Read as text without the pictures, that is quickly.
    every = SampleReader(data, samples=None, seed=0, columns={"image": "", "text": column})
    return tuple(sorted({sample.text for _, sample in every if sample.text}))


def numbers_of(names: Sequence[str], own: Sequence[str]) -> dict[str, int]:
    """Labels in lower case to class numbers: ``names``, and by their order those of the data set if they are as many.

    So names that were written for prompts ("tench") stand for labels as the data set has them ("n01440764").
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
            raise CalibrationError(f"{source} has no class in row {index}: task '{task}' needs one with every picture")
        found.append(label)
    return found


@dataclass
class TopClasses:
    """Collects the classes with the highest scores and the rank of the right one."""

    task: str
    names: Sequence[str]
    source: str
    ranks: list[int] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def ranked(self, scores: torch.Tensor, labels: torch.Tensor) -> dict[str, list[int]]:
        """Of a batch with scores ``[B, C]`` and class numbers ``[B]``: the ``best`` classes, the right ones' ``ranks``.

        A wrong class that scores as high as the right one counts as before it.

        Raises:
            NonFiniteLoss: a score is NaN or infinite.
        """
        check_finite(scores, "the score of a class", self.source)
        right = labels[:, None] == torch.arange(scores.shape[1])[None]
        return {"best": scores.argmax(1).tolist(), "ranks": ranks(scores, right).tolist()}

    def add(self, rows: Iterable[int], labels: torch.Tensor, graded: Mapping[str, list[int]]) -> None:
        """Count a batch: rows of the source, class numbers ``[B]``, and what :meth:`graded` found."""
        self.ranks += graded["ranks"]
        for row, best, label, rank in zip(rows, graded["best"], labels.tolist(), graded["ranks"], strict=True):
            self.predictions.append(
                {"index": row, "prediction": self._name(best), "truth": self._name(label), "score": float(rank < 1)}
            )

    def result(self, settings: dict[str, Any]) -> TaskResult:
        """Top-1 accuracy, and top-5 where there are more than five classes."""
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
