"""Chooses the dtype that a model computes in, and runs it on its first calibration batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ecoflap.data.objectives import Objective, on_device
from ecoflap.errors import CalibrationError, EcoflapError
from ecoflap.model.compute import settled
from ecoflap.model.lazy_logits import logits_on_demand
from ecoflap.model.patching import cache_disabled
from ecoflap.model.read_elsewhere import misses_weights
from ecoflap.model.trace import evaluating
from ecoflap.support.memory import memory_error
from ecoflap.support.text import first_line
from ecoflap.support.workers import ALONE, Workers


def computed_in(model: nn.Module, asked: str, batches: Sequence[Any], loss: Objective, workers: Workers = ALONE) -> str:
    """:func:`ecoflap.model.compute.settled` by the first worker, tried on the first batch."""

    def trial() -> None:
        with torch.no_grad(), evaluating(model), cache_disabled(model), logits_on_demand(model):
            on_device(loss)(model, batches[0])

    return workers.from_first(lambda: settled(asked, model, trial if len(batches) else None))


@contextmanager
def taking(model: nn.Module) -> Iterator[None]:
    """Context that turns an error of the model's code on its first calibration batch into one line.

    Raises:
        CalibrationError: the model can't take the batch.
        RuntimeError: a weight was not in memory; ``with_weights`` around this context loads it.
    """
    try:
        yield
    except EcoflapError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if memory_error(error) is not None or misses_weights(model, error):
            raise
        raise CalibrationError(
            f"{type(model).__name__} can't take the calibration data ({type(error).__name__}: {first_line(error)}): "
            "check the data, its columns, the sequence length and the objective"
        ) from error


def first_run(loss: Objective) -> Objective:
    """``loss`` for the first forward on calibration data: the batch is moved, errors are those of :func:`taking`.

    Logits are computed only at the positions that the loss reads, as in the probes of stage 1: all logits would take
    more memory than all later work.
    """

    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        with taking(model), logits_on_demand(model):
            return on_device(loss)(model, batch)

    return run
