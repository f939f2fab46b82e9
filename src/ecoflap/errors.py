"""Errors that a user can fix: one class for each kind; each message says in one line what, where and what to do."""

from __future__ import annotations


class EcoflapError(Exception):
    """Base of every error with a message for the user; the command line prints it as one line.

    ``exit_code`` is 2 for input that the user can fix, 1 for a run that failed.
    """

    exit_code = 2


class InvalidOption(EcoflapError):
    """An option has a value out of range, or two options contradict each other."""


class UnknownName(EcoflapError):
    """A name (criterion, task, layer, ...) is not registered; the message suggests similar ones."""


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
        batch: number of the calibration batch, if one is at fault.
    """

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class PartlyPruned(EcoflapError):
    """Pruning failed part-way, and there was no memory to keep the dense weights: the model must be loaded again.

    Attributes:
        changed: names of the layers that are pruned already; all others are unchanged.
    """

    exit_code = 1

    def __init__(self, message: str, changed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.changed = changed


class OutputExists(EcoflapError):
    """The output directory is not empty, and neither ``--overwrite`` nor ``--resume`` was given."""


class ResumeMismatch(EcoflapError):
    """The recipe, model or versions differ from those of the run to resume; the message shows the difference."""


class StorageError(EcoflapError):
    """A file could not be written: disk full, no permission. An earlier file is intact."""


class OutOfMemory(EcoflapError):
    """The machine has too little memory for the options; the message says which ones need less."""


class MissingDependency(EcoflapError):
    """An optional package is needed; the message gives the ``pip install`` line."""


class BrokenPlugin(EcoflapError):
    """A criterion, task etc. of another package can't be imported or used; the message names the package."""


class WorkerLost(EcoflapError):
    """Another worker has ended, so this one can't continue."""

    exit_code = 1


class HubError(EcoflapError):
    """The Hub refuses, or can't be reached: no token, no permission, no network. Nothing on the disk is changed."""

    exit_code = 1
