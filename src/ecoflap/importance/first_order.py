"""Gradient importance: one backward pass a batch, each weight's gradient reduced to one number and freed at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecoflap.importance.gradients import visit_gradients
from ecoflap.importance.probe import Key, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.network.parts import Anatomy
from ecoflap.registry import unknown


def _gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ|g|."""
    return gradient.abs().sum()


def _weight_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ|w|·|g| (the first-order form of ECoFLaP)."""
    return (weight * gradient).abs().sum()


def _fisher(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ w²·g² (optimal brain damage with the empirical Fisher diagonal; LeCun et al. 1989)."""
    return (weight * gradient).square().sum()


def _squared_weight_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Σ w²·|g|."""
    return (weight.square() * gradient.abs()).sum()


def _norm(weight: Tensor, gradient: Tensor) -> Tensor:
    """√(2/π)·‖g‖₂, what the zeroth order estimates, exactly."""
    return gradient.square().sum().sqrt() * math.sqrt(2 / math.pi)


# All are linear in what is averaged over batches, so that one number a batch is enough: Σ|w|·E|g| = E Σ|w|·|g|.
VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight-gradient": _weight_gradient,
    "gradient": _gradient,
    "fisher": _fisher,
    "squared-weight-gradient": _squared_weight_gradient,
    "norm": _norm,
}


@dataclass(frozen=True)
class FirstOrder:
    """Elementwise gradient scores, summed per matrix (Sung et al. 2024, section 3.2 and its comparison of measures).

    Gradients are taken of each batch's mean loss. No gradient outlives its hook, and only one block's graph exists at a
    time, so that the memory above a forward's is the inputs of the blocks, one block's activations and one matrix.

    Attributes:
        variant: one of :data:`VARIANTS`.
        recompute: compute each block again in the backward pass instead of keeping its activations: one more forward a
            batch, same scores.
    """

    scatter: ClassVar[float] = 0.0  # between batches alone

    variant: str = "weight-gradient"
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("first-order variant", self.variant, list(VARIANTS))

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The blocks of all towers, unless a weight belongs to several, or graphs are kept."""
        if not self.recompute or any(layer.aliases for layer in anatomy.layers):
            return ()
        return tuple(block.name for block in anatomy.blocks)

    def steps(self, context: ProbeContext) -> int:
        return len(context.layers) * len(context.batches)

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One a batch."""
        for index in range(len(context.batches)):
            yield tuple((layer.name, index, 0) for layer in context.layers)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value a (layer, batch); 0 for a layer that the loss does not depend on.

        Raises:
            InvalidOption: the model can't be differentiated.
        """
        reduce = VARIANTS[self.variant]
        names = [layer.name for layer in context.layers]
        for index in range(len(context.batches)):
            if all((name, index, 0) in context.done for name in names):
                continue
            values = dict.fromkeys(names, 0.0)

            def visit(name: str, weight: Tensor, gradient: Tensor, values: dict[str, float] = values) -> None:
                values[name] = float(reduce(weight, gradient))

            visit_gradients(context, index, visit, recompute=self.recompute)
            for name, value in values.items():
                if (name, index, 0) not in context.done:
                    yield Estimate(name, index, 0, value)
