"""Gradient importance: one backward pass per batch, in which every gradient is reduced to one number and freed.

``gradient-norm`` is the exact norm of each matrix's loss gradient, which the zeroth order estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.base import ImportanceMeasure, Key, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.model.offload import Offloaded, read_weight
from ecoflap.model.parts import Anatomy, parameter_of
from ecoflap.model.patching import gradients_set_aside
from ecoflap.model.recompute import recomputing, reloading
from ecoflap.model.slices import experts_in_turn, stored_matrix
from ecoflap.model.swapping import slices_swapped
from ecoflap.support.registry import unknown

Visit = Callable[[str, Tensor, Tensor], None]


def visit_gradients(
    context: ProbeContext,
    index: int,
    visit: Visit,
    *,
    recompute: bool = True,
    instead: str = "--importance zeroth-order needs none",
) -> None:
    """Call ``visit(name, weight, gradient)`` for each layer that the loss of batch ``index`` depends on.

    Weight and gradient have the shape of the stored parameter. The gradient is freed after its visit. With
    ``recompute`` only one block's graph exists at a time, so the additional memory is the inputs of the blocks, one
    block's activations and one matrix. The model's own flags and gradients are restored at the end.

    Args:
        instead: advice for the user if gradients can't be taken.

    Raises:
        InvalidOption: the model can't be differentiated.
        NonFiniteLoss: the loss is not finite.
    """
    elsewhere = set(Offloaded(context.model).among(dict.fromkeys(layer.parameter for layer in context.layers)))
    of_block: dict[str, list[str]] = {block: [] for block in context.blocks if block in context.upcast}
    stay: list[str] = []
    for layer in context.layers:
        if layer.parameter in elsewhere or layer.block in context.upcast:
            of_block.setdefault(layer.block, []).append(layer.name)
        else:
            stay.append(layer.name)

    slices: dict[str, Tensor] = {}  # leaves that replace slices of stacked parameters
    parts: dict[str, Tensor] = {}  # gradients so far of weights that are used, and reloaded, several times

    def hook_of(name: str, last: bool) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad if name not in parts else parts.pop(name).add_(parameter.grad)
            parameter.grad = None
            if last:
                visit(name, parameter.detach(), gradient)
            else:
                parts[name] = gradient

        return hook

    def watch(name: str, last: bool = True) -> Callable[[], None]:
        weight: Tensor
        if parameter_of(name) == name:
            weight = context.model.get_parameter(name)
        else:  # a separate leaf, so that no gradient is as large as the parameter
            slices[name] = weight = stored_matrix(context.model, name)
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(hook_of(name, last))  # type: ignore[no-untyped-call]
        return handle.remove  # type: ignore[no-any-return]

    def loaded(block: str, last: bool) -> None:  # its weights are new tensors each time and need new hooks
        for name in of_block[block]:
            watch(name, last)

    with (
        torch.enable_grad(),
        gradients_set_aside(context.model),
        experts_in_turn(context.model),
        slices_swapped(context.model, [layer for layer in context.layers if layer.stacked], slices),
        recomputing(context.model, [path for path in context.blocks if path not in of_block] if recompute else ()),
        reloading(context.model, list(of_block), loaded),
        ExitStack() as hooks,
    ):
        context.model.requires_grad_(False)
        for name in stay:
            hooks.callback(watch(name))
        _backward(context, index, f"gradients can't be taken; {instead}")
        for name, gradient in parts.items():  # the loss did not depend on the last use
            visit(name, read_weight(context.model, name).to(gradient.dtype), gradient)


def _backward(context: ProbeContext, index: int, advice: str) -> None:
    loss = context.loss_tensor(index)
    if not loss.requires_grad:
        raise InvalidOption(f"the loss of {type(context.model).__name__} has no graph: {advice}")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise InvalidOption(f"{type(context.model).__name__}: {str(error).splitlines()[0]}: {advice}") from error


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
    """√(2/π)·‖g‖₂, the exact value of the zeroth order's estimate."""
    return gradient.square().sum().sqrt() * math.sqrt(2 / math.pi)


# All are linear in what is averaged over batches, so that one number per batch is enough: Σ|w|·E|g| = E Σ|w|·|g|.
VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight-gradient": _weight_gradient,
    "gradient": _gradient,
    "fisher": _fisher,
    "squared-weight-gradient": _squared_weight_gradient,
    "norm": _norm,
}


@dataclass(frozen=True)
class FirstOrder(ImportanceMeasure):
    """Elementwise gradient scores, summed per matrix (Sung et al. 2024, section 3.2 and its comparison of measures).

    Each batch's mean loss is differentiated, with the memory of :func:`visit_gradients`.

    Attributes:
        variant: one of :data:`VARIANTS`.
        recompute: recompute each block in the backward pass instead of storing its activations: one more forward per
            batch, same scores.
    """

    scatter: ClassVar[float | None] = 0.0  # between batches alone
    blockwise: ClassVar[bool] = True
    lead: ClassVar[float] = 0.25  # the forward; then each block is computed again, and differentiated

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
        """One value per (layer, batch); 0 for a layer that the loss does not depend on.

        Raises:
            InvalidOption: the model can't be differentiated.
        """
        reduce = VARIANTS[self.variant]
        names = [layer.name for layer in context.layers]
        for index in range(len(context.batches)):
            if all((name, index, 0) in context.done for name in names):
                continue
            values = dict.fromkeys(names, 0.0)

            def visit(
                name: str, weight: Tensor, gradient: Tensor, index: int = index, values: dict[str, float] = values
            ) -> None:
                values[name] = float(reduce(weight, gradient))
                if (name, index, 0) not in context.done:
                    context.seen(name)

            visit_gradients(context, index, visit, recompute=self.recompute)
            for name, value in values.items():
                if (name, index, 0) not in context.done:
                    yield Estimate(name, index, 0, value)


@dataclass(frozen=True)
class GradientNorm(ImportanceMeasure):
    """√(2/π)·‖∇L‖₂ of each matrix, the mean of the zeroth-order estimate (Sung et al. 2024, section 3.2) without noise.

    Attributes:
        recompute: as in :class:`~ecoflap.importance.gradient.FirstOrder`.
    """

    scatter: ClassVar[float | None] = 0.0  # between batches alone
    blockwise: ClassVar[bool] = True
    lead: ClassVar[float] = 0.25  # the forward; then each block is computed again, and differentiated

    recompute: bool = True

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        return self._first_order().upcast(anatomy)

    def steps(self, context: ProbeContext) -> int:
        return self._first_order().steps(context)

    def pieces(self, context: ProbeContext) -> Iterator[tuple[Key, ...]]:
        """One a batch."""
        return self._first_order().pieces(context)

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """One value per (layer, batch); 0 for a layer that the loss does not depend on."""
        return self._first_order().estimates(context)

    def _first_order(self) -> FirstOrder:
        return FirstOrder(variant="norm", recompute=self.recompute)
