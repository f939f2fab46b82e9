"""Defines local criteria and criteria for the whole model, and makes one by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ecoflap.allocation.patterns import Compare, Pattern
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.importance.base import ProbeContext
from ecoflap.model.parts import Layer
from ecoflap.pruning.registry import CRITERIA
from ecoflap.statistics.inputs import InputStatistics, all_finite
from ecoflap.support.progress import Task
from ecoflap.support.registry import check_options

Scores = Callable[[Layer], Tensor]


@runtime_checkable
class GlobalCriterion(Protocol):
    """A global rule: compares scores over the whole model, or over each tower, in one or several rounds."""

    @property
    def name(self) -> str: ...

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """Zeros of a pool of ``weights`` weights after each round; the last is ``zeros`` and the largest.

        The number of rounds is the same for all pools.
        """
        ...

    def steps(self, batches: int) -> int:
        """Number of progress steps of :meth:`scores` for ``batches`` batches."""
        ...

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """The scores of each layer's weights in the current model.

        Args:
            context: model, layers, calibration batches and objective.
            offload: keep tensors of the size of the model in the computer's memory.
            task: receives each step.

        Returns:
            a function from a layer to its scores: fp32, at least 0, in the shape of the stored parameter; the same at
            each call while the layer's weights are the same.
        """
        ...


Needs = Literal["none", "norm", "gram", "pair"]
BlockOrder = Literal["block", "sequential"]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pruned(NamedTuple):
    """A pruned weight (out, in) in its original dtype, and its mask (out, in), True = kept."""

    weight: Tensor
    mask: Tensor


class Criterion(Protocol):
    """A local rule: decides which weights of one layer become zero, and may update the others."""

    @property
    def name(self) -> str: ...

    @property
    def statistics(self) -> Needs:
        """The statistics of the layer's inputs: none, an InputNorm, an InputGram, or an InputPair (each includes those
        before)."""
        ...

    @property
    def default_compare(self) -> Compare:
        """Where scores are compared by default in an unstructured pattern: in each row, or in the whole matrix."""
        ...

    @property
    def order(self) -> BlockOrder:
        """The order in a block: "block" prunes all layers at once; "sequential" one group of layers with the same input
        after the other, on inputs that the pruned groups before have produced."""
        ...

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Prune ``weight`` (out, in) to exactly ``zeros`` zeros; the input tensor is not changed.

        Computes in fp32. Weights that are zero already are treated as any other.

        Raises:
            InvalidOption: ``zeros`` or the shape doesn't fit the pattern.
            CalibrationError: the statistics are missing, empty, or have another width.
            NonFiniteLoss: the weight or the statistics are not finite.
        """
        ...


def make_criterion(name: str, options: Mapping[str, Any] | None = None) -> Criterion | GlobalCriterion:
    """The criterion registered as ``name`` with these options.

    Raises:
        UnknownName: no such criterion.
        InvalidOption: it has no such option, or the value is out of range.
    """
    factory: Any = CRITERIA.get(name)
    check_options("criterion", name, factory, options or {})
    made: Criterion | GlobalCriterion = factory(**(options or {}))
    return made


def check_order(order: str) -> None:
    """Raises InvalidOption unless ``order`` is one of :data:`BlockOrder`."""
    if order not in ("block", "sequential"):
        raise InvalidOption(f"order must be 'block' or 'sequential', not {order!r}")


def check_statistics(criterion: str, statistics: InputStatistics | None, columns: int) -> InputStatistics:
    """``statistics`` if they fit a weight of ``columns`` inputs; raises CalibrationError otherwise."""
    if statistics is None:
        raise CalibrationError(
            f"criterion '{criterion}' needs statistics of the layer's inputs: give calibration batches"
        )
    if statistics.columns != columns:
        raise CalibrationError(
            f"the statistics are of {statistics.columns} inputs but the weight has {columns} columns"
        )
    if statistics.tokens == 0:
        raise CalibrationError(
            f"criterion '{criterion}': no calibration token reached the layer; add samples or exclude the layer"
        )
    return statistics


def zero_out(weight: Tensor, mask: Tensor) -> Pruned:
    """``weight`` with zeros where ``mask`` is False; kept weights are bit-identical."""
    if not all_finite(weight):
        raise NonFiniteLoss(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values; check the checkpoint"
        )
    bits = _BITS[weight.element_size()]  # a bit mask takes a tenth of masked_fill's time, and leaves no -0
    return Pruned((weight.view(bits) & -mask.to(bits)).view(weight.dtype), mask)
