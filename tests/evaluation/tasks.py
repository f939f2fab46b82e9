"""Runs a task by its name; what all tasks are given and the task's own options stand side by side."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ecoflap.evaluation import TASKS, TaskResult, TestData

COMMON = {field.name for field in fields(TestData)}


def run_task(name: str, model: Any, processor: Any, **settings: Any) -> TaskResult:
    """``settings`` are fields of :class:`ecoflap.evaluation.TestData`, or options of the task."""
    task = TASKS.get(name)(**{key: value for key, value in settings.items() if key not in COMMON})
    test = TestData(**{key: value for key, value in settings.items() if key in COMMON})
    return task.run(model, processor, test)
