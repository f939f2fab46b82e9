"""Repeats a forward from the first block that changed: blocks memoise their inputs and outputs of the current batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecoflap.model.carried import Left, contents, left, packed, restore
from ecoflap.model.patching import forward_replaced, has_tangent


@dataclass
class _Call:
    """One memoised call: flattened arguments, outputs, changes of its carriers, and versions of all tensors."""

    leaves: list[Any]
    spec: Any
    output: Any
    left: Left
    versions: list[int]

    def current(self) -> bool:
        """Whether no memoised tensor was written to since."""
        return self.versions == _versions((self.leaves, self.output, self.left))


def _versions(tree: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class ReplayCounts:
    """Numbers of block calls that were computed and that were replayed."""

    computed: int = 0
    replayed: int = 0


@dataclass
class _Memory:
    calls: list[_Call] = field(default_factory=list)


class Replay:
    """Memoises the blocks of a model for one batch at a time.

    Inside the context, the first forward is recorded. In a later forward of the same batch, a block whose inputs are
    the recorded ones (the same tensors, or equal ones) returns its recorded outputs (the same tensor objects, so that
    the next block sees unchanged inputs). A block named in :meth:`forcing` is always computed; later blocks are
    computed only if their inputs differ. Results under :meth:`forcing` are not recorded. The loss is that of the plain
    forward, to the bit.

    Forward-mode derivatives pass through: a call with a tangent among its inputs is always computed and never recorded,
    because its tangent is new even if its values are not. Calls without a tangent are replayed.

    A recording is valid only with the weights that it was made with: code that changes a weight must force the blocks
    that own it, or call :meth:`reset`.

    Args:
        model: the model; put it in eval mode, without dropout or a KV cache.
        blocks: paths of the blocks to memoise.

    Not thread-safe. Block forwards are wrapped on the instances and put back at exit.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._modules = {path: model.get_submodule(path) for path in blocks}
        self._memories: dict[str, _Memory] = {}
        self._forced: frozenset[str] = frozenset()
        self._recording = True
        self._same: dict[
            tuple[int, int], Tensor
        ] = {}  # equal pairs; keeps the new tensor, so that its id is not reused
        self._wraps = ExitStack()
        self.counts = ReplayCounts()

    def __enter__(self) -> Replay:
        for path, module in self._modules.items():
            self._wraps.enter_context(forward_replaced(module, partial(self._wrapper, path)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._wraps.close()
        self.reset()

    def reset(self) -> None:
        """Drop all recordings: call before another batch, or after weights were changed."""
        self._memories.clear()
        self._same.clear()

    @contextmanager
    def forcing(self, *blocks: str) -> Iterator[None]:
        """Compute these blocks even if their inputs are unchanged (because their weights are)."""
        outer = self._forced, self._recording
        self._forced, self._recording = frozenset(blocks), False
        try:
            yield
        finally:
            self._forced, self._recording = outer
            self._same.clear()

    def _wrapper(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return forward(*args, **kwargs)  # a recorded output has no graph
            leaves, spec = pytree.tree_flatten(packed(args, kwargs))
            moving = any(has_tangent(leaf) for leaf in leaves)
            if path not in self._forced and not moving:
                for call in self._memories.get(path, _Memory()).calls:
                    if self._matches(call, leaves, spec):
                        self.counts.replayed += 1
                        restore(call.left, args, kwargs)
                        return call.output
            self.counts.computed += 1
            entered = contents(args, kwargs)
            output = forward(*args, **kwargs)
            if self._recording and not moving:
                memory = self._memories.setdefault(path, _Memory())
                memory.calls = [call for call in memory.calls if call.current()]
                behind = left(entered, args, kwargs)
                memory.calls.append(_Call(leaves, spec, output, behind, _versions((leaves, output, behind))))
            return output

        return replayed

    def _matches(self, call: _Call, leaves: list[Any], spec: Any) -> bool:
        if call.spec != spec or not call.current():
            return False
        return all(self._equal(old, new) for old, new in zip(call.leaves, leaves, strict=True))

    def _equal(self, old: Any, new: Any) -> bool:
        if old is new:
            return True
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            return type(old) is type(new) and bool(old == new)
        if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
            return False
        key = (id(old), id(new))
        if key in self._same:
            return True
        if torch.equal(old, new):
            # Masks and position embeddings are new tensors in each forward, but the same for all blocks: compared once.
            self._same[key] = new
            return True
        return False
