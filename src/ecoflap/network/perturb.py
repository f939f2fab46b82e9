"""Swaps a weight for another tensor inside a context, never writing into the parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ecoflap.network.tangents import has_tangent


@contextmanager
def swapped(model: nn.Module, modules: Sequence[str], tensor: Tensor, name: str = "weight") -> Iterator[None]:
    """Let the modules at these paths use ``tensor`` as their ``name`` parameter; the old ones return at exit.

    Args:
        model: owner of the modules.
        modules: paths of all modules that share the parameter.
        tensor: same shape as the parameter; not copied. A tangent that it carries (forward mode) is kept.
    """
    owners = [model.get_submodule(path) for path in modules]
    originals = [owner._parameters[name] for owner in owners]
    # A Parameter would lose the tangent; a module reads a plain tensor from here as well.
    stand_in = tensor if has_tangent(tensor) else nn.Parameter(tensor, requires_grad=False)
    try:
        for owner in owners:
            owner._parameters[name] = stand_in  # type: ignore[assignment]
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner._parameters[name] = original


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside the context, and each has its old one (and its flag) at exit."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
