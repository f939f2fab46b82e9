"""Defines a small protocol for progress, so that the library can report without knowing a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

LOADING = "loading"  # the stage before the work, of which nothing is kept: who stops it need not wait for its end


class Task(Protocol):
    """One stage under way."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Reports ``steps`` more of the stage's total as done; ``detail`` names the current work (a layer's name)."""


def plan(task: Task, kinds: Sequence[str]) -> None:
    """Tell a task that can use it (it has a method ``plan``) of which kind each step to come is.

    Steps of one kind take about the same time, which differs from that of other kinds.
    """
    receive = getattr(task, "plan", None)
    if receive is not None:
        receive(kinds)


class Progress(Protocol):
    """Opens one :class:`Task` a stage: ``with progress.stage("importance", total=840) as task``."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        """Opens a stage of ``total`` steps, ``done`` of which an interrupted run has done before."""


class _SilentTask:
    def advance(self, steps: int = 1, detail: str = "") -> None:
        pass


class Silent:
    """Reports nothing; the default of the Python API."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())


class Labelled:
    """Progress that adds a label to each stage's name, such as the model: dense or pruned."""

    def __init__(self, inner: Progress, label: str) -> None:
        self._inner, self._label = inner, label

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        return self._inner.stage(f"{name}, {self._label}", total, done)
