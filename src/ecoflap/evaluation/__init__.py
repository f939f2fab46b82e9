"""Quality of a model on a task: accuracy, captions, retrieval, classification, perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ecoflap.evaluation.task import Measured, TaskResult
from ecoflap.support.progress import Progress
from ecoflap.support.registry import Registry, unknown

SUITES = "lm_eval:"  # what the name of a suite of the lm-eval package begins with


class Task(Protocol):
    """One task: a function from model, processor and data to a result with its standard error.

    Beside these, a task may take ``columns``, ``prompt_template``, ``workers`` (those who share its samples) and
    options of its own, all by keyword and with defaults.
    """

    def __call__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        data: str | Path | None,
        samples: int | None,
        batch_size: int,
        sequence_length: int | None,
        seed: int,
        progress: Progress,
    ) -> TaskResult: ...


class _Tasks(Registry[Task]):
    """Our own tasks, and any suite of lm-eval as ``lm_eval:NAME``."""

    def check(self, name: str) -> str:
        if name.startswith(SUITES) and name != SUITES:
            return name
        if name not in self:
            raise unknown(self.kind, name, [*self.names(), SUITES + "NAME"])
        return name

    def get(self, name: str) -> Task:
        if not name.startswith(SUITES):
            return super().get(name)
        from ecoflap.evaluation.lm_eval import suite

        found: Task = suite(self.check(name).removeprefix(SUITES))
        return found


TASKS = _Tasks(
    "task",
    {
        "vqa": "ecoflap.evaluation.vqa:run",
        "captioning": "ecoflap.evaluation.captioning:run",
        "retrieval": "ecoflap.evaluation.retrieval:run",
        "zero-shot": "ecoflap.evaluation.zero_shot:run",
        "image-classification": "ecoflap.evaluation.image_classification:run",
        "knn": "ecoflap.evaluation.knn:run",
        "nlvr2": "ecoflap.evaluation.nlvr2:run",
        "perplexity": "ecoflap.evaluation.perplexity:run",
        "answer-perplexity": "ecoflap.evaluation.answer_perplexity:run",
        "multiple-choice": "ecoflap.evaluation.multiple_choice:run",
    },
)

__all__ = ["TASKS", "Measured", "Task", "TaskResult"]
