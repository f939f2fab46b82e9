"""Replaces a module's parameter by packed experts that look like a tensor to the module's code, and undoes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ecoflap.model.packed.stack import SUFFIX, PackedStack
from ecoflap.model.packed.stacked_matrices import FlatMatrices, StackedMatrices


def owner_with(module: nn.Module, leaf: str, stack: PackedStack) -> None:
    """Replace the parameter ``leaf`` of ``module`` by ``stack``, and add a property ``leaf`` that looks like a tensor.

    A property belongs to a class, so the module gets a subclass of its own, with the name of its former class.
    """
    del module._parameters[leaf]
    module.add_module(leaf + SUFFIX, stack)
    kind = type(module)
    stacks = (*getattr(kind, "_packed_stacks", ()), leaf)
    base = kind.__mro__[1] if hasattr(kind, "_packed_stacks") else kind
    module.__class__ = _class_with(base, stacks)


def owner_without(module: nn.Module, leaf: str, dense: nn.Parameter) -> None:
    """Undo :func:`owner_with`; ``dense`` becomes the parameter."""
    kind = type(module)
    stacks = tuple(name for name in kind._packed_stacks if name != leaf)  # type: ignore[attr-defined]
    base = kind.__mro__[1]
    del module._modules[leaf + SUFFIX]
    module.__class__ = _class_with(base, stacks) if stacks else base
    module.register_parameter(leaf, dense)


def _class_with(base: type[nn.Module], stacks: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {leaf: _property(leaf) for leaf in stacks}
    body |= {"_packed_stacks": stacks, "__module__": base.__module__, "__qualname__": base.__qualname__,
             "__reduce_ex__": _reduce, "__doc__": base.__doc__}  # fmt: skip
    return type(base.__name__, (base,), body)


def _property(leaf: str) -> property:
    def found(module: nn.Module) -> Tensor:
        stack: Any = module._modules[leaf + SUFFIX]
        return FlatMatrices(stack) if stack.flat else StackedMatrices(stack)

    return property(found)


def _reduce(module: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` for copies and pickles, which can't find the subclass by its name: it is built again."""
    return _rebuild, (type(module).__mro__[1], type(module)._packed_stacks), module.__dict__


def _rebuild(base: type[nn.Module], stacks: tuple[str, ...]) -> nn.Module:
    kind = _class_with(base, stacks)
    return kind.__new__(kind)
