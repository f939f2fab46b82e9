"""One backward pass of a calibration batch in which no gradient outlives its visit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.importance.probe import ProbeContext
from ecoflap.network.offload import Offloaded, read_weight
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
    elsewhere = set(Offloaded(context.model).among(layer.name for layer in context.layers))
    of_block: dict[str, list[str]] = {block: [] for block in context.blocks if block in context.upcast}
    stay: list[str] = []
    for layer in context.layers:
        if layer.name in elsewhere or layer.block in context.upcast:
            of_block.setdefault(layer.block, []).append(layer.name)
        else:
            stay.append(layer.name)

    parts: dict[str, Tensor] = {}  # of weights that are used several times, and made anew each time

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
        weight = context.model.get_parameter(name)
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(hook_of(name, last))  # type: ignore[no-untyped-call]
        return handle.remove  # type: ignore[no-any-return]

    def loaded(block: str, last: bool) -> None:  # its weights are new tensors each time, and go with their hooks
        for name in of_block[block]:
            watch(name, last)

    with (
        torch.enable_grad(),
        gradients_set_aside(context.model),
        recomputing(context.model, [path for path in context.blocks if path not in of_block] if recompute else ()),
        reloading(context.model, list(of_block), loaded),
        ExitStack() as hooks,
    ):
        context.model.requires_grad_(False)
        for name in stay:
            hooks.callback(watch(name))
        _backward(context, index, f"gradients can't be taken; {instead}")
        for name, gradient in parts.items():  # the last use did not matter to the loss
            visit(name, read_weight(context.model, name).to(gradient.dtype), gradient)


def _backward(context: ProbeContext, index: int, advice: str) -> None:
    loss = context.loss_tensor(index)
    if not loss.requires_grad:
        raise InvalidOption(f"the loss of {type(context.model).__name__} has no graph: {advice}")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise InvalidOption(f"{type(context.model).__name__}: {str(error).splitlines()[0]}: {advice}") from error
