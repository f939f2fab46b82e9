"""One backward pass of a calibration batch in which no gradient outlives its visit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.probe import ProbeContext
from ecoflap.network.perturb import gradients_set_aside
from ecoflap.network.recompute import recomputing

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

    Weight and gradient have the shape of the stored parameter. The gradient is freed after its visit; with
    ``recompute`` only one block's graph exists at a time, so that the memory above a forward's is the inputs of the
    blocks, one block's activations and one matrix. Flags and gradients of the model's own are as before at the end.

    Args:
        instead: what a user may do where there are no gradients.

    Raises:
        InvalidOption: the model can't be differentiated.
        NonFiniteLoss: the loss is not finite.
    """
    weights: Mapping[str, torch.nn.Parameter] = {
        layer.name: context.model.get_parameter(layer.name) for layer in context.layers
    }

    def hook_of(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            visit(name, parameter.detach(), parameter.grad)
            parameter.grad = None

        return hook

    with (
        torch.enable_grad(),
        gradients_set_aside(context.model),
        recomputing(context.model, context.blocks if recompute else ()),
        ExitStack() as hooks,
    ):
        context.model.requires_grad_(False)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.callback(weight.register_post_accumulate_grad_hook(hook_of(name)).remove)  # type: ignore[no-untyped-call]
        _backward(context, index, f"gradients can't be taken; {instead}")


def _backward(context: ProbeContext, index: int, advice: str) -> None:
    loss = context.loss_tensor(index)
    if not loss.requires_grad:
        raise InvalidOption(f"the loss of {type(context.model).__name__} has no graph: {advice}")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise InvalidOption(f"{type(context.model).__name__}: {str(error).splitlines()[0]}: {advice}") from error
