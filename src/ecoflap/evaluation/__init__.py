"""Quality of a model on a task: accuracy, perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ecoflap.evaluation.results import TaskResult
from ecoflap.progress import Progress
from ecoflap.registry import Registry


class Task(Protocol):
    """One task: a function from model, processor and data to a result with its standard error."""

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


TASKS: Registry[Task] = Registry(
    "task",
    {
        "vqa": "ecoflap.evaluation.vqa:run",
        "perplexity": "ecoflap.evaluation.perplexity:run",
    },
)

__all__ = ["TASKS", "Task", "TaskResult"]
