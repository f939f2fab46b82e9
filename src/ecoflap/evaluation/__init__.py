"""Measures the quality of a model on a task, one file for each task.

Imports ``data``, ``model`` and the folders below. The names in ``__all__`` are imported at their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecoflap.evaluation.registry import TASKS
from ecoflap.support.lazy import lazily

if TYPE_CHECKING:
    from ecoflap.evaluation.task import Measured, Task, TaskResult, TestData

__all__ = ["TASKS", "Measured", "Task", "TaskResult", "TestData"]

# Imported when first used: the names of tasks, which --help lists, need no torch.
__getattr__ = lazily(__name__, dict.fromkeys(("Measured", "Task", "TaskResult", "TestData"), "ecoflap.evaluation.task"))
