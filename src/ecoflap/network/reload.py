"""Backward passes through blocks whose weights are read for the forward, and read again when their gradient is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecoflap.errors import InvalidOption
from ecoflap.network.forward import Forward, forward_replaced
from ecoflap.network.offload import resident

Loaded = Callable[[str], None]


@contextmanager
def reloading(model: nn.Module, blocks: Sequence[str], loaded: Loaded) -> Iterator[None]:
    """Inside the context, these blocks of an adopted model keep their inputs alone for the backward.

    There the block is held in memory, computed again with a graph, and taken backward at once, so that the weights and
    activations of one block exist at a time. (Reloading in the midst of torch's own checkpoint would not do: its graph
    holds on to the weights of the first forward.)

    Args:
        model: without dropout (eval mode): random numbers are not replayed.
        blocks: paths of blocks that don't contain one another.
        loaded: called with a block's path when it is held in memory, before it is computed for its gradients: its
            parameters are new tensors each time.

    Raises:
        InvalidOption: in a forward that calls a block twice, whose gradients would come in parts.
    """
    called: set[str] = set()

    def wrapper(path: str) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                if path in called:
                    raise InvalidOption(f"{path} runs more than once a forward: its gradients need the model in memory")
                called.add(path)
                return _Call(model, path, forward, loaded, (args, kwargs)).apply()

            return run

        return wrap

    with ExitStack() as wraps:
        for path in blocks:
            wraps.enter_context(forward_replaced(model.get_submodule(path), wrapper(path)))
        yield


class _Call:
    """One call of a block, as a function of the tensors among its arguments."""

    def __init__(self, model: nn.Module, path: str, forward: Forward, loaded: Loaded, arguments: Any) -> None:
        self._model, self._path, self._forward, self._loaded = model, path, forward, loaded
        self._leaves, self._spec = pytree.tree_flatten(arguments)
        self._output: tuple[list[Any], Any] = ([], None)

    def apply(self) -> Any:
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        trigger = torch.zeros((), requires_grad=True)  # a graph, also where no input has one
        found = iter(_Reloaded.apply(self, trigger, *tensors))  # type: ignore[no-untyped-call]
        leaves, spec = self._output
        return pytree.tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors among the outputs for these inputs."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        self._output = pytree.tree_flatten(self._forward(*args, **kwargs))
        return tuple(leaf for leaf in self._output[0] if isinstance(leaf, Tensor))

    def backward(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Leave in the leaves among ``inputs`` what the outputs' gradients give."""
        with torch.enable_grad(), resident(self._model, self._path):
            self._loaded(self._path)
            outputs = self.run(inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


class _Reloaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, trigger: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return call.run(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)
        ]
        ctx.call.backward(inputs, gradients)
        return (None, None, *(tensor.grad for tensor in inputs))
