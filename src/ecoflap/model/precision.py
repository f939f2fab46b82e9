"""Computes in fp32 with a half-precision model: converts the whole model, or each block while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from ecoflap.model.offload import in_memory
from ecoflap.model.patching import Forward, forward_replaced

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def computing_in_fp32(model: nn.Module, blocks: Sequence[str] = ()) -> Iterator[None]:
    """Context in which half-precision parameters and buffers are fp32; at exit they have their old bits again.

    The conversion is exact in both directions (every fp16 and bf16 number is an fp32 number), so no second copy is
    kept; converted weights take twice their bytes. Weights in ``blocks`` are converted only while their block runs, so
    the extra memory is one block's fp32 weights and the converted rest (embeddings, head). Results are the same to the
    bit. Parameter objects stay the same, so ties are kept. An offloaded block is in memory while it runs.

    Args:
        blocks: paths of blocks that don't contain one another. A backward pass through them is possible only with
            :func:`ecoflap.model.recompute.reloading`.
    """
    modules = [model.get_submodule(path) for path in blocks]
    inside = {id(tensor) for module in modules for tensor in _half(module)}
    within = {id(child) for module in modules for child in module.modules()}
    for child in model.modules():
        if id(child) not in within:  # modules that others share are converted for the whole context
            inside -= {id(tensor) for tensor in _half(child, recurse=False)}
    changed: list[tuple[Tensor, torch.dtype]] = []
    config = getattr(model, "config", None)
    configured = getattr(config, "dtype", None)
    with ExitStack() as wraps:
        try:
            for tensor in _half(model):
                if id(tensor) not in inside:
                    changed.append((tensor, tensor.dtype))
                    tensor.data = tensor.data.float()
            for path, module in zip(blocks, modules, strict=True):
                wraps.enter_context(forward_replaced(module, partial(_upcasting, model, path)))
            yield
        finally:
            for tensor, dtype in changed:
                tensor.data = tensor.data.to(dtype)
            if config is not None and configured is not None:
                config.dtype = configured


@contextmanager
def leaves_in_fp32(module: nn.Module) -> Iterator[None]:
    """Context in which the module's parameters are new leaf tensors, fp32 for half precision, so gradients are fp32.

    A parameter object whose data is replaced would keep the dtype of its gradient.
    """
    new: dict[int, nn.Parameter] = {}
    places = [
        (owner, leaf, parameter)
        for owner in module.modules()
        for leaf, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]
    try:
        for owner, leaf, parameter in places:
            if id(parameter) not in new:
                values = parameter.detach()
                values = values.float() if values.dtype in _HALF else values
                new[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            owner._parameters[leaf] = new[id(parameter)]
        yield
    finally:
        for owner, leaf, parameter in places:
            owner._parameters[leaf] = parameter


def half_blocks(model: nn.Module, blocks: Sequence[str], *, offloaded: bool = False) -> tuple[str, ...]:
    """Those of ``blocks`` that have half-precision weights in memory, for :func:`computing_in_fp32`.

    Empty if a block has the model's first parameter: inputs get its dtype, and no module before the blocks would
    convert them to fp32.

    Args:
        offloaded: also include blocks whose weights are offloaded.
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    found = {path: [one for one in _half(model.get_submodule(path)) if offloaded or not one.is_meta] for path in blocks}
    if any(one is first for tensors in found.values() for one in tensors):
        return ()
    return tuple(path for path, tensors in found.items() if tensors)


def _half(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return [tensor for tensor in tensors if tensor.dtype in _HALF]


def _upcasting(model: nn.Module, path: str, forward: Forward) -> Callable[..., Any]:
    module = model.get_submodule(path)

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as state:
            with DisableTorchFunction():  # ResumedCalls must not record this
                away = any(tensor.is_meta for tensor in _half(module))
            if away:
                state.enter_context(in_memory(model, path))
            state.enter_context(_upcast(module))
            return forward(*args, **kwargs)

    return run


@contextmanager
def _upcast(module: nn.Module) -> Iterator[None]:
    """Context in which the module's parameters and buffers have fp32 values; at exit they have their old storage.

    If a graph may be recorded, they are replaced by fp32 tensors instead, since a backward pass would find the old
    values. The same holds for a tensor that replaces a parameter and has a graph (a masked weight).
    """
    held = [
        (places, leaf, tensor)
        for owner in module.modules()
        for places in (owner._parameters, owner._buffers)
        for leaf, tensor in places.items()
        if tensor is not None and tensor.dtype in _HALF
    ]
    graph = torch.is_grad_enabled()
    with DisableTorchFunction():
        replaced = [entry for entry in held if graph or entry[2].grad_fn is not None]
        before = [(tensor, tensor.data) for _, _, tensor in held if not graph and tensor.grad_fn is None]
    before = list({id(tensor): (tensor, values) for tensor, values in before}.values())
    made: dict[int, Tensor] = {}  # one for all places of a tied weight
    try:
        with DisableTorchFunction():
            for tensor, values in before:
                tensor.data = values.float()
        for places, leaf, tensor in replaced:
            places[leaf] = made.setdefault(id(tensor), tensor.float())  # type: ignore[assignment]
        yield
    finally:
        for places, leaf, tensor in replaced:
            places[leaf] = tensor  # type: ignore[assignment]
        with DisableTorchFunction():
            for tensor, values in before:
                tensor.data = values
