"""Restores a model's weights if pruning fails part-way; without memory for copies, names the changed layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import psutil
import torch
from torch import Tensor, nn

from ecoflap.errors import PartlyPruned
from ecoflap.model.kept_weights import KeptWeights
from ecoflap.model.offload import Offloaded, keep_placeholders
from ecoflap.model.parts import Layer, parameter_of
from ecoflap.model.slices import matrix_in
from ecoflap.support.text import first_line

SHARE = 0.25  # of the free memory for copies: the walk needs the rest
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_log = logging.getLogger("ecoflap")


@contextmanager
def restored_on_failure(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Context that restores ``layers`` if it ends with an error or a signal.

    A copy of their weights is kept in the CPU's memory, if it takes at most a quarter of the free memory. Weights on
    the disk need no copy: their files stay, and the model reads them again.

    Raises:
        PartlyPruned: an error occurred after layers had been changed, and there was no memory for copies; names the
            changed layers.
    """
    keep_placeholders(model)
    weights = Offloaded(model)
    names = list(dict.fromkeys(layer.parameter for layer in layers))
    away = weights.among(names)
    here = [name for name in names if name not in set(away)]
    size = sum(model.get_parameter(name).nbytes for name in here) + weights.held(away)
    if size <= SHARE * psutil.virtual_memory().available:
        kept, back = KeptWeights(model, here), weights.remembered(away)
        try:
            yield
        except BaseException:
            kept.restore()
            back()
            raise
        return
    before = _sums(model, layers)
    try:
        yield
    except BaseException as error:
        after = _sums(model, layers)
        changed = tuple(name for name in before if before[name] != after[name])
        if not changed:
            raise
        told = f"{len(changed)} of {len(before)} layers are pruned already, {changed[0]} to {changed[-1]}"
        if not isinstance(error, Exception):
            _log.warning("stopped: %s", told)
            raise
        raise PartlyPruned(
            f"{first_line(error)}: {told} (no room for a copy of the dense weights): load the model again", changed
        ) from error


def _sums(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Sum of each layer's weights, with their bits read as integers, to detect a change of the weights."""
    weights, found = Offloaded(model), dict[str, int]()
    for parameter, names in groupby((layer.name for layer in layers), parameter_of):
        values = weights.read(model.get_parameter(parameter))  # stacked matrices are read once
        found |= {name: _sum(matrix_in(values, name)) for name in names}
    return found


def _sum(matrix: Tensor) -> int:
    bits = matrix.contiguous().view(_BITS[matrix.element_size()])
    return int(bits.sum(dtype=torch.int64))
