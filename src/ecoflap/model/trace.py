"""Traces one forward: which modules run, in which order, by which caller, and which of them form a chain."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ecoflap.model.offload import placeholder_of
from ecoflap.model.slices import Stack, experts_in_turn, factors, product_with

Batch = Mapping[str, Any]
Run = Callable[[nn.Module, Any], Any]


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and model outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in eval mode; at exit every submodule has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def plain_forward(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(batch)`` otherwise."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def linear_weight(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The weight, if this call of a torch function is ``torch.nn.functional.linear``."""
    if func is not nn.functional.linear:
        return None
    weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
    return weight if isinstance(weight, Tensor) else None


class _Origins(TorchFunctionMode):
    """Follows tensors through every operation, to find from which watched modules each comes directly.

    A parent may change the hidden states between two blocks (Qwen3-VL adds image features), in place or not.
    """

    def __init__(self, weights: StackedWeights) -> None:
        super().__init__()
        self._known: Any = WeakTensorKeyDictionary()  # weak, so that activations are freed
        self._multiplied: dict[int, weakref.ref[Tensor]] = {}  # by id, weights of calls of functional.linear
        self.weights = weights

    @property
    def multiplied(self) -> set[int]:
        """Ids of those weights of functional.linear that still exist: the ids of others may be reused."""
        return {key for key, found in self._multiplied.items() if found() is not None}

    def of(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        """The paths that any of ``tensors`` comes from."""
        return frozenset().union(*(self._known[tensor] for tensor in tensors if tensor in self._known))

    def set(self, tensors: Sequence[Tensor], origins: frozenset[str]) -> None:
        for tensor in tensors:
            self._known[tensor] = origins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.weights.see(func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if (weight := linear_weight(func, args, kwargs)) is not None and not self.weights.called(weight):
            weight = placeholder_of(self.weights.model, weight)
            self._multiplied[id(weight)] = weakref.ref(weight)
        given = tensors_in((args, kwargs))
        if origins := self.of(given):
            self.set(tensors_in(result), origins)
            name = getattr(func, "__name__", "")
            if given and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
                self.set(given[:1], origins)  # written in place
        return result


class StackedWeights:
    """Finds the parameters that stack matrices, and how they stack them, from the products of a forward.

    Args:
        model: owner of the parameters.
        stack: paths of the modules whose forwards are running, the innermost last.
    """

    def __init__(self, model: nn.Module, stack: Sequence[str]) -> None:
        self.model, self._stack = model, stack
        self._owners = {
            path: (module, leaves)
            for path, module in model.named_modules()
            if (leaves := [leaf for leaf, p in module._parameters.items() if p is not None and _may_stack(module, p)])
        }
        self._ways: dict[str, set[Stack]] = {}
        self.reached: dict[str, int] = {}
        """Name of each such parameter to the number of slices up to the last that was multiplied by."""

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """Record the call if it multiplies by slices of a parameter of a running module."""
        if not self._owners or factors(func, args, kwargs) is None:
            return
        for path in reversed(self._stack):
            module, leaves = self._owners.get(path, (None, ()))
            for leaf in leaves:
                parameter: Tensor = getattr(module, leaf)
                product = product_with(func, args, kwargs, parameter)
                if product is not None:
                    way = Stack(product.turned, product.of or len(parameter), bool(product.of))
                    name, end = f"{path}.{leaf}", product.first + max(1, product.count)
                    self._ways.setdefault(name, set()).add(way)
                    self.reached[name] = max(end, self.reached.get(name, 0))
                    return

    def called(self, weight: Tensor) -> bool:
        """Whether it belongs to the module whose forward is running."""
        running = self.model.get_submodule(self._stack[-1]) if self._stack else self.model
        return any(parameter is weight for parameter in running._parameters.values())

    def found(self) -> dict[str, Stack]:
        """The stacks by name of their parameter."""
        return {name: next(iter(ways)) for name, ways in self._ways.items() if len(ways) == 1}


def _may_stack(module: nn.Module, parameter: Tensor) -> bool:
    """Whether it has three dimensions; or two, in a module that is no linear layer, embedding and the like."""
    if parameter.dim() == 2:
        return not isinstance(module, nn.Linear | nn.Embedding | nn.MultiheadAttention)
    return parameter.dim() == 3


@dataclass
class Trace:
    """The record of one forward.

    Attributes:
        ranks: for each called module, the rank of its first call.
        drivers: for each called module, the path of the innermost module in whose forward it was (first) called.
        calls: number of calls of each module.
        chained: pairs ``(a, b)`` of watched modules: the output of ``a``, or a tensor computed from it outside of
            watched modules, was an argument of ``b``.
        multiplied: ids of the parameters with which ``torch.nn.functional.linear`` was called, but not by their module.
        stacked: the parameters that stack matrices, by name.
        reached: for the same names, the number of slices up to the last that was multiplied by.
        inputs: for each watched module, the names of the batch's entries that its arguments were computed from outside
            of other watched modules.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    drivers: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    chained: set[tuple[str, str]] = field(default_factory=set)
    multiplied: set[int] = field(default_factory=set)
    stacked: dict[str, Stack] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, frozenset[str]] = field(default_factory=dict)

    def position(self, path: str) -> int:
        """Rank of the first call of ``path``; modules that are never called come last."""
        return self.ranks.get(path, len(self.ranks))


def trace(model: nn.Module, batch: Any, watched: set[str], run: Run = plain_forward) -> Trace:
    """Run one forward and record the calls.

    Args:
        model: any module; its mode and hooks are restored.
        batch: what ``run`` takes.
        watched: paths of the modules between which chains are looked for.
        run: how to run the model on the batch, by default ``model(**batch)``.
    """
    result = Trace()
    stack: list[str] = []
    origins = _Origins(StackedWeights(model, stack))
    # Entries of the batch have origins that can't be paths of modules.
    entries = {f"batch entry {name}": str(name) for name in batch} if isinstance(batch, Mapping) else {}

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in result.calls:
                result.ranks[path] = len(result.ranks)
                result.drivers[path] = stack[-1] if stack else ""
            result.calls[path] = result.calls.get(path, 0) + 1
            stack.append(path)
            if path in watched:
                reached = origins.of(tensors_in((args, kwargs)))
                result.chained.update((origin, path) for origin in reached - entries.keys())
                named = frozenset(entries[origin] for origin in reached & entries.keys())
                result.inputs[path] = result.inputs.get(path, frozenset()) | named

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            if path in watched:
                origins.set(tensors_in(output), frozenset({path}))

        return hook

    with ExitStack() as hooks, evaluating(model), experts_in_turn(model), torch.no_grad(), origins:
        for origin, name in entries.items():
            origins.set(tensors_in(batch[name]), frozenset({origin}))
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after(path)).remove)
        run(model, batch)
    result.multiplied = origins.multiplied
    result.stacked = origins.weights.found()
    result.reached = origins.weights.reached
    return result
