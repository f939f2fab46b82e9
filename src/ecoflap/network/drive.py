"""Runs one tower block by block on all batches, with the arguments that its parent's own forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecoflap.network.forward import Forward, forward_replaced
from ecoflap.network.parts import Tower

Run = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):
    """Ends a forward early. Not an Exception, so that no model's own handler swallows it."""


@dataclass
class BlockCall:
    """One call of a block: the batch it belongs to and its arguments."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Item:
    """One call of the tower's driver: its arguments, and the output of the last block that ran."""

    call: BlockCall
    output: Any = None


class TowerDriver:
    """Steps through the blocks of one tower.

    For each block, the parent's forward is called with its own arguments while the blocks before return the output of
    the block just before (T5's position biases travel in it), and the block itself only takes note of its arguments.
    Kept at any time: the parent's arguments and the inputs or outputs of one block, for all batches.

    Args:
        model: in eval mode, without a KV cache.
        tower: which one; the towers before it are run as they are now, pruned or not.
        batches: what ``run`` takes.
        run: runs the model on one batch.
        offload: keep what is kept on the CPU, and move it to its device for each call.
    """

    def __init__(
        self, model: nn.Module, tower: Tower, batches: Sequence[Any], run: Run, *, offload: bool = False
    ) -> None:
        self._driver = model.get_submodule(tower.driver)
        self._blocks = [model.get_submodule(block.name) for block in tower.blocks]
        self._offload = offload
        self._calls: list[tuple[_Item, BlockCall]] = []
        self._items = [
            _Item(call)
            for index, batch in enumerate(batches)
            for call in self._driver_calls(model, tower, index, batch, run)
        ]

    def _driver_calls(self, model: nn.Module, tower: Tower, index: int, batch: Any, run: Run) -> list[BlockCall]:
        found: list[BlockCall] = []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(BlockCall(index, *self._keep((args, kwargs))))
            # The last call need not be run here; an earlier one must, since what follows may depend on it.
            if len(found) == tower.calls:
                raise _Reached

        handle = self._driver.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with suppress(_Reached), torch.no_grad():
                run(model, batch)
        finally:
            handle.remove()
        return found

    def enter(self, index: int) -> int:
        """Take the inputs of block ``index`` for all batches; the blocks before it must have been run.

        Returns:
            The number of calls; 0 if the parent does not call this block.
        """
        self._calls = []
        for item in self._items:
            arguments = self._capture(item, index)
            if arguments is not None:
                self._calls.append((item, BlockCall(item.call.batch, *arguments)))
        return len(self._calls)

    def _capture(self, item: _Item, index: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def skip(forward: Forward) -> Forward:
            return lambda *args, **kwargs: self._use(item.output)

        def take(forward: Forward) -> Forward:
            def taking(*args: Any, **kwargs: Any) -> Any:
                taken.append(self._keep((args, kwargs)))
                raise _Reached

            return taking

        args, kwargs = self._use((item.call.args, item.call.kwargs))
        with ExitStack() as wraps, torch.no_grad():
            for number, block in enumerate(self._blocks[: index + 1]):
                wraps.enter_context(forward_replaced(block, take if number == index else skip))
            with suppress(_Reached):
                self._driver(*args, **kwargs)
        return taken[0] if taken else None

    def run(self, index: int, before: Callable[[BlockCall], None] | None = None) -> None:
        """Run block ``index`` on the inputs taken by :meth:`enter`, and keep its outputs for the next block.

        Args:
            before: called with each call (arguments on their device) just before the block runs.
        """
        for item, call in self._calls:
            args, kwargs = self._use((call.args, call.kwargs))
            if before is not None:
                before(BlockCall(call.batch, args, kwargs))
            with torch.no_grad():
                item.output = self._keep(self._blocks[index](*args, **kwargs))

    def _keep(self, tree: Any) -> Any:
        if not self._offload:
            return tree
        return pytree.tree_map_only(Tensor, lambda tensor: (tensor.device, tensor.cpu()), tree)

    def _use(self, tree: Any) -> Any:
        if not self._offload:
            return tree
        return pytree.tree_map(_back, tree, is_leaf=_is_kept)


def _is_kept(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[0], torch.device)


def _back(leaf: Any) -> Any:
    return leaf[1].to(leaf[0]) if _is_kept(leaf) else leaf
