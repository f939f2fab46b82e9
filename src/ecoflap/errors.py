"""Errors that a user can fix: one class for each kind; each message says in one line what, where and what to do."""

from __future__ import annotations


class EcoflapError(Exception):
    """Base of every error with a message for the user; the command line prints it as one line.

    ``exit_code`` is 2 for input that the user can fix, 1 for a run that failed.
    """

    exit_code = 2


class InvalidOption(EcoflapError):
    """An option has a value out of its range, or two options contradict each other."""


class UnknownName(EcoflapError):
    """A name (criterion, task, layer, ...) that is not registered; the message suggests near ones."""


class CalibrationError(EcoflapError):
    """Calibration data is missing, empty, unreadable, too small, or does not fit the model."""


class CheckpointError(EcoflapError):
    """A checkpoint cannot be read or written: missing, broken, pickle only, unknown class."""


class AnatomyError(EcoflapError):
    """No towers or prunable layers were found, or a pattern selects nothing."""


class InfeasibleAllocation(EcoflapError):
    """The sparsity cannot be reached under the cap, floors or pattern; the message gives the feasible range."""


class NonFiniteLoss(EcoflapError):
    """A loss, score or statistic is NaN or infinite; the message names the batch and the layer.

    Attributes:
        batch: number of the calibration batch, where one is at fault.
    """

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class PartlyPruned(EcoflapError):
    """Pruning failed part-way, and there was no room to keep the dense weights: the model must be loaded again.

    Attributes:
        changed: names of the layers that are pruned already; all others are as they were.
    """

    exit_code = 1

    def __init__(self, message: str, changed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.changed = changed


class OutputExists(EcoflapError):
    """The output directory already holds something and neither ``--overwrite`` nor ``--resume`` was given."""


class ResumeMismatch(EcoflapError):
    """The recipe, model or versions differ from those of the run to resume; the message shows the difference."""


class StorageError(EcoflapError):
    """A file could not be written: disk full, no permission. What was there before is intact."""


class OutOfMemory(EcoflapError):
    """The machine has too little memory for the options; the message says which ones need less."""


class MissingDependency(EcoflapError):
    """An optional package is needed; the message gives the ``pip install`` line."""


class BrokenPlugin(EcoflapError):
    """What another package adds (criterion, task, ...) can't be imported or used; the message names the package."""


class WorkerLost(EcoflapError):
    """Another worker has ended, so that this one can't go on either."""

    exit_code = 1


class HubError(EcoflapError):
    """The Hub refuses, or can't be reached: no token, no right to write, no network. Nothing on the disk is changed."""

    exit_code = 1
