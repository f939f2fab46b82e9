"""Defines a small protocol for progress, so that the library can report without a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

LOADING = "loading"  # the stage before the work; it can be stopped at once, since nothing of it is kept


class Task(Protocol):
    """One running stage."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Report ``steps`` more steps as done; ``detail`` names the current work (such as a layer)."""


def plan(task: Task, kinds: Sequence[str]) -> None:
    """Tell a task with a method ``plan`` the kind of each step to come.

    Steps of the same kind take about the same time.
    """
    receive = getattr(task, "plan", None)
    if receive is not None:
        receive(kinds)


def early(task: Task, steps: int, detail: str = "") -> None:
    """Tell a task of steps whose results are not stored yet: it shows them, and does not end the work there.

    A task without a method ``early`` counts them as finished.
    """
    getattr(task, "early", task.advance)(steps, detail)


def kept(task: Task) -> None:
    """Tell a task, if it has a method ``kept``, that the results of all steps told early are now stored."""
    receive = getattr(task, "kept", None)
    if receive is not None:
        receive()


class Progress(Protocol):
    """Opens one :class:`Task` per stage: ``with progress.stage("importance", total=840) as task``."""

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        """Open a stage of ``total`` steps, of which an interrupted run has done ``done``."""


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
