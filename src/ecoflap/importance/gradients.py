"""One backward pass of a calibration batch in which no gradient outlives its visit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.probe import ProbeContext
from ecoflap.network.offload import Offloaded
from ecoflap.network.perturb import gradients_set_aside
from ecoflap.network.recompute import recomputing
from ecoflap.network.reload import reloading

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
    elsewhere = Offloaded(context.model).among(layer.name for layer in context.layers)
    of_block: dict[str, list[str]] = {}
    for name in elsewhere:
        of_block.setdefault(context.anatomy.layer(name).block, []).append(name)
    weights: Mapping[str, torch.nn.Parameter] = {
        layer.name: context.model.get_parameter(layer.name) for layer in context.layers if layer.name not in elsewhere
    }

    def hook_of(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            visit(name, parameter.detach(), parameter.grad)
            parameter.grad = None

        return hook

    def watch(name: str, weight: torch.nn.Parameter) -> Callable[[], None]:
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(hook_of(name))  # type: ignore[no-untyped-call]
        return handle.remove  # type: ignore[no-any-return]

    def loaded(block: str) -> None:  # its weights are new tensors each time, and go with their hooks
        for name in of_block[block]:
            watch(name, context.model.get_parameter(name))

    with (
        torch.enable_grad(),
        gradients_set_aside(context.model),
        recomputing(context.model, [path for path in context.blocks if path not in of_block] if recompute else ()),
        reloading(context.model, list(of_block), loaded),
        ExitStack() as hooks,
    ):
        context.model.requires_grad_(False)
        for name, weight in weights.items():
            hooks.callback(watch(name, weight))
        _backward(context, index, f"gradients can't be taken; {instead}")


def _backward(context: ProbeContext, index: int, advice: str) -> None:
    loss = context.loss_tensor(index)
    if not loss.requires_grad:
        raise InvalidOption(f"the loss of {type(context.model).__name__} has no graph: {advice}")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise InvalidOption(f"{type(context.model).__name__}: {str(error).splitlines()[0]}: {advice}") from error
