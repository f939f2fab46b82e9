"""Importance ``auto``: gradient norms if the model can be differentiated, else the zeroth order.

Both measure √(2/π)·‖∇L‖₂ of each matrix (Sung et al. 2024, section 3.2): the zeroth order by two forwards for each
matrix and batch, with noise; gradient norms exactly, by one backward pass for each batch. A trial decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ecoflap.data.objectives import Objective, on_device
from ecoflap.errors import InvalidOption
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.gradient import GradientNorm, visit_gradients
from ecoflap.importance.registry import GRADIENT_NORM, ZEROTH_ORDER
from ecoflap.model.parts import Anatomy, Block
from ecoflap.model.patching import cache_disabled, gradients_set_aside
from ecoflap.model.precision import computing_in_fp32, half_blocks
from ecoflap.model.trace import evaluating
from ecoflap.support.memory import memory_error
from ecoflap.support.text import first_line


@dataclass(frozen=True)
class Choice:
    """The importance that ``auto`` chose.

    Attributes:
        name: of the importance.
        reason: why it was chosen, as part of a sentence.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"importance: {self.name} ({self.reason})"


def choose(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], loss: Objective) -> Choice:
    """One backward pass of ``batch`` to the first block of each tower decides. The model is unchanged afterwards.

    Raises:
        NonFiniteLoss: the loss of the batch is NaN or infinite.
    """
    obstacle = _obstacle(model, anatomy, batch, loss)
    name = type(model).__name__
    if obstacle is None:
        paper = f"--importance {ZEROTH_ORDER} is the paper's, by forward passes only"
        return Choice(GRADIENT_NORM, f"auto: {name} can be differentiated; {paper}")
    return Choice(ZEROTH_ORDER, f"auto: gradients of {name} can't be taken: {obstacle}")


def _obstacle(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], loss: Objective) -> str | None:
    """Why gradients can't be taken, in one line; None if they can."""
    first = {tower.name: next(block for block in tower.blocks if block.layers) for tower in anatomy.towers}
    towers = tuple(replace(tower, blocks=(first[tower.name],)) for tower in anatomy.towers)
    ran: set[str] = set()
    reached: set[str] = set()

    def visit(name: str, weight: Tensor, gradient: Tensor) -> None:
        reached.add(name)
        if not bool(gradient.isfinite().all()):
            raise InvalidOption(f"the gradient of {name} is not finite")

    with ExitStack() as state:
        for context_manager in (evaluating(model), cache_disabled(model), gradients_set_aside(model)):
            state.enter_context(context_manager)
        upcast = half_blocks(model, GradientNorm().upcast(anatomy))
        state.enter_context(computing_in_fp32(model, upcast))
        for block in first.values():
            handle = model.get_submodule(block.name).register_forward_pre_hook(_noting(block, ran))
            state.callback(handle.remove)
        few = replace(anatomy, towers=towers)
        context = ProbeContext(model, few, [batch], on_device(loss), 0, upcast=frozenset(upcast))
        try:
            visit_gradients(context, 0, visit)
        except (InvalidOption, RuntimeError) as error:
            if memory_error(error) is not None:
                return "a backward pass needs more memory than there is"
            line = first_line(error)
            return line.partition(": gradients can't be taken")[0]
    for block in first.values():
        if block.name in ran and not any(layer.name in reached for layer in block.layers):
            return f"none reaches {block.name}, though it runs"
    return None


def _noting(block: Block, ran: set[str]) -> Any:
    def hook(*_: Any) -> None:
        ran.add(block.name)

    return hook
