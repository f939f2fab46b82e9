"""Runs backward passes that store only the inputs of each block, and recompute the other activations.

Also for blocks whose weights are offloaded or converted, and are loaded again for the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ecoflap.model.carried import Arguments, contents, left, packed, restore, unpacked
from ecoflap.model.offload import in_memory
from ecoflap.model.patching import Forward, forward_replaced, trim
from ecoflap.model.precision import leaves_in_fp32

_TRIM_EVERY = 2  # calls of blocks


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Context in which the graph of each of these blocks is dropped after its forward and rebuilt in the backward pass.

    Memory then holds the activations of one block and the inputs of all (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost"), for one more forward. Gradients are the same.

    The heap is trimmed after every few blocks; otherwise most of the memory that their forwards free stays with the
    process (SmolLM2-135M, 8 × 128 tokens: 300 MiB at the end of the forward for 70 MiB in use).

    Args:
        model: without dropout (eval mode): random numbers are not replayed.
        blocks: paths of blocks that don't contain one another.
    """

    calls = count(1)

    def recomputed(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = partial(_Repeatable(forward, packed(args, kwargs)) if contents(args, kwargs) else forward, **kwargs)
            found = checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)
            if next(calls) % _TRIM_EVERY == 0:
                trim()
            return found

        return run

    with ExitStack() as wraps:
        for path in blocks:
            wraps.enter_context(forward_replaced(model.get_submodule(path), recomputed))
        yield


class _Repeatable:
    """A call of a block that can be repeated. Only the first call changes its arguments (such as a key-value cache)."""

    def __init__(self, forward: Forward, entered: Arguments) -> None:
        self._forward, self._entered = forward, entered
        self._called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called:
            args, kwargs = unpacked(*self._entered)
        self._called = True
        return self._forward(*args, **kwargs)


Loaded = Callable[[str, bool], None]
_TENSOR = object()  # replaces a tensor among a call's arguments


@contextmanager
def reloading(model: nn.Module, blocks: Sequence[str], loaded: Loaded) -> Iterator[None]:
    """Context in which these blocks store only their inputs for the backward pass.

    In the backward pass each block is loaded in fp32, recomputed with a graph, and differentiated at once, so memory
    holds the weights and activations of one block. (torch's own checkpointing can't do this: its graph keeps the
    weights of the first forward.)

    Args:
        model: without dropout (eval mode): random numbers are not replayed.
        blocks: paths of blocks that don't contain one another.
        loaded: called with a block's path when it is in memory, before its gradients are computed, and with whether
            this is the last time: a block that runs twice in a forward gets its gradients in two parts. Its parameters
            are new tensors each time.
    """
    calls: Counter[str] = Counter()

    def due(path: str) -> None:
        calls[path] -= 1
        loaded(path, calls[path] == 0)

    def wrapper(path: str) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                calls[path] += 1
                found = _Call(model, path, forward, due).apply(args, kwargs)
                trim()
                return found

            return run

        return wrap

    with ExitStack() as wraps:
        for path in blocks:
            wraps.enter_context(forward_replaced(model.get_submodule(path), wrapper(path)))
        yield


class _Call:
    """One call of a block, as a function of the tensors among its arguments."""

    def __init__(self, model: nn.Module, path: str, forward: Forward, due: Callable[[str], None]) -> None:
        self._model, self._path, self._forward, self._due = model, path, forward, due
        self._leaves: list[Any] = []
        self._spec: Any = None
        self._output: tuple[list[Any], Any] = ([], None)

    def apply(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, self._spec = pytree.tree_flatten(packed(args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # the graph keeps the tensors
        trigger = torch.zeros((), requires_grad=True)  # so that there is a graph even if no input has one
        found = iter(_Reloaded.apply(self, trigger, *tensors))  # type: ignore[no-untyped-call]
        (leaves, spec), self._output = self._output, ([], None)
        output, behind = pytree.tree_unflatten(
            [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )
        restore(behind, args, kwargs)
        return output

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors among the outputs for these inputs."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self._leaves]
        args, kwargs = unpacked(*pytree.tree_unflatten(leaves, self._spec))
        entered = contents(args, kwargs)
        output = self._forward(*args, **kwargs)
        self._output = pytree.tree_flatten((output, left(entered, args, kwargs)))
        return tuple(leaf for leaf in self._output[0] if isinstance(leaf, Tensor))

    def backward(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients to the leaves among ``inputs``, from those of the outputs."""
        module = self._model.get_submodule(self._path)
        with torch.enable_grad(), in_memory(self._model, self._path), leaves_in_fp32(module):
            self._due(self._path)
            outputs = self.run(inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
            self._output = ([], None)  # its graph would keep the block's weights
            del outputs, pairs
        trim()


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
