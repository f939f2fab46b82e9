"""Replaces forwards and weights inside a context, turns off the key-value cache, and marks dual tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Forward = Callable[..., Any]


@contextmanager
def forward_replaced(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Context in which ``module.forward`` is ``wrap(old forward)``; hooks still run."""
    own = module.__dict__.get("forward")  # an instance attribute if another tool has replaced it already
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own


def with_tangent(tensor: Tensor, tangent: Tensor) -> Tensor:
    """A view of ``tensor`` with a ``tangent`` (same shape and dtype) until the surrounding ``dual_level`` ends."""
    dual: Tensor = forward_ad.make_dual(tensor, tangent)  # type: ignore[no-untyped-call]
    return dual


def tangent_of(tensor: Tensor) -> Tensor | None:
    """The forward-mode derivative of a tensor, in its shape; None if it has none."""
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def has_tangent(value: Any) -> bool:
    """Whether this is a tensor with a forward-mode derivative."""
    return isinstance(value, Tensor) and tangent_of(value) is not None


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Context in which torch's attention uses elementary operators, because fused kernels have no forward mode.

    This includes ``nn.MultiheadAttention``, which has its own kernel. The matrix of attention weights is then in
    memory.
    """
    fast: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def swapped(model: nn.Module, modules: Sequence[str], tensor: Tensor, name: str = "weight") -> Iterator[None]:
    """Context in which the modules at these paths use ``tensor`` as their ``name`` parameter.

    Args:
        model: owner of the modules.
        modules: paths of all modules that share the parameter.
        tensor: in the shape of the parameter; not copied. Its tangent (forward mode) and graph are kept.
    """
    owners = [model.get_submodule(path) for path in modules]
    originals = [owner._parameters[name] for owner in owners]
    # A Parameter would lose tangent and graph; modules also read plain tensors from here.
    stand_in = tensor if has_tangent(tensor) or tensor.requires_grad else nn.Parameter(tensor, requires_grad=False)
    try:
        for owner in owners:
            owner._parameters[name] = stand_in  # type: ignore[assignment]
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner._parameters[name] = original


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Context in which no parameter has a gradient; at exit gradients and ``requires_grad`` are restored."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


def _configurations(config: Any, seen: set[int]) -> Iterator[Any]:
    """``config`` and the configurations nested in its attributes, each once."""
    if id(config) in seen or not hasattr(config, "__dict__"):
        return
    seen.add(id(config))
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configurations(value, seen)


@contextmanager
def cache_disabled(model: nn.Module) -> Iterator[None]:
    """Context with ``use_cache=False`` in the configurations of all submodules."""
    seen: set[int] = set()
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        for attribute in ("config", "generation_config"):
            for config in _configurations(getattr(module, attribute, None), seen):
                if "use_cache" in vars(config):
                    found.append((config, config.use_cache))
    try:
        for config, _ in found:
            config.use_cache = False
        yield
    finally:
        for config, value in found:
            config.use_cache = value


def trim() -> None:
    """Return all free pages of the C library's heap to the system; has an effect only with glibc.

    Small objects that stay (the nodes of a graph) lie between large ones that are freed, so the heap grows although
    most of it is free. Reusing a page costs a page fault, so don't call this in inner loops.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
