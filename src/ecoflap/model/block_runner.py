"""Runs one tower block by block on all batches, with the arguments that the tower's own forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.model.activation_store import Offload, offload_kind
from ecoflap.model.carried import Left, contents, left, packed, restore, unpacked
from ecoflap.model.parts import Tower
from ecoflap.model.patching import Forward, forward_replaced
from ecoflap.model.resumed import ResumedCalls

Run = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):
    """Ends a forward early. A BaseException, so that no handler inside a model catches it."""


class Enough(BaseException):
    """Ends the forward of a block that is observed; see :meth:`TowerDriver.observe`."""


@dataclass
class BlockCall:
    """One call of a block: the batch it belongs to and its arguments."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Item:
    """One call of the tower's driver: its arguments, the last block's output, and changes of carriers."""

    call: BlockCall
    output: Any = None
    left: Left = field(default_factory=dict)


def tower_entries(
    model: nn.Module, towers: Sequence[Tower], batches: Sequence[Any], run: Run, store: Offload
) -> dict[str, list[BlockCall]]:
    """By tower, the calls of its parent's forward for all batches; one forward per batch, up to the last of them.

    Args:
        store: keeps the arguments.
    """
    found: dict[str, list[BlockCall]] = {tower.name: [] for tower in towers}
    for index, batch in enumerate(batches):
        before = {tower.name: len(found[tower.name]) for tower in towers}

        def note(tower: Tower, args: Any, kwargs: Any, index: int = index, before: dict[str, int] = before) -> None:
            found[tower.name].append(BlockCall(index, *store.keep(packed(args, kwargs))))
            # The last call can be skipped here; an earlier one must run, since later ones may depend on it.
            if all(len(found[one.name]) - before[one.name] >= one.calls for one in towers):
                raise _Reached

        with ExitStack() as hooks, suppress(_Reached), torch.no_grad():
            for tower in towers:
                hook = model.get_submodule(tower.driver).register_forward_pre_hook(
                    lambda module, args, kwargs, tower=tower, note=note: note(tower, args, kwargs), with_kwargs=True
                )
                hooks.callback(hook.remove)
            run(model, batch)
    return found


class TowerDriver:
    """Steps through the blocks of one tower.

    For each block, the parent's forward is called with its own arguments. The earlier blocks return the output of the
    block just before (which contains T5's position biases), and the block itself only records its arguments. Only the
    parent's arguments and the inputs or outputs of one block are kept, for all batches.

    Args:
        model: in eval mode, without a KV cache.
        tower: the tower to run; the towers before it are run in their current state, pruned or not.
        batches: what ``run`` takes.
        run: runs the model on one batch.
        offload: "cpu" (or True) or "disk": where inputs are kept; they are moved to their device for each call.
        folder: of the file, for "disk"; by default the system's folder for temporary files.
        entries: the result of :func:`tower_entries`; None: it is called here.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        batches: Sequence[Any],
        run: Run,
        *,
        offload: bool | str = False,
        folder: Path | None = None,
        entries: Sequence[BlockCall] | None = None,
    ) -> None:
        self._driver = model.get_submodule(tower.driver)
        self._blocks = [model.get_submodule(block.name) for block in tower.blocks]
        # A block that is called again after others can't be skipped: its second output isn't its first.
        self._skipped = [] if tower.repeats else self._blocks
        self._offload = Offload(offload_kind(offload), folder)
        self._calls: list[tuple[_Item, BlockCall]] = []
        if entries is None:
            entries = tower_entries(model, [tower], batches, run, self._offload)[tower.name]
        self._items = [_Item(call) for call in entries]

    @property
    def offloads(self) -> bool:
        """Whether inputs are offloaded from their device."""
        return self._offload.kind != "none"

    def enter(self, index: int) -> int:
        """Record the inputs of block ``index`` for all batches; the blocks before it must have been run.

        Returns:
            The number of calls; 0 if the parent does not call this block.
        """
        self._calls = []
        for item in self._items:
            arguments = self._capture(item, index)
            if arguments is not None:
                item.output = None  # of the block before; this block's arguments contain what it needs
                self._calls.append((item, BlockCall(item.call.batch, *arguments)))
        return len(self._calls)

    def _capture(self, item: _Item, index: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def skip(forward: Forward) -> Forward:
            def skipping(*args: Any, **kwargs: Any) -> Any:
                restore(self._offload.use(item.left), args, kwargs)
                return self._offload.use(item.output)

            return skipping

        def take(forward: Forward) -> Forward:
            def taking(*args: Any, **kwargs: Any) -> Any:
                taken.append(self._offload.keep(packed(args, kwargs)))
                raise _Reached

            return taking

        args, kwargs = self._arguments(item.call)
        with ExitStack() as wraps, torch.no_grad():
            wraps.enter_context(forward_replaced(self._blocks[index], take))
            for block in self._skipped[:index]:
                wraps.enter_context(forward_replaced(block, skip))
            with suppress(_Reached):
                self._driver(*args, **kwargs)
        return taken[0] if taken else None

    def _arguments(self, call: BlockCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """New arguments for one call, on their device, so that changes by one call are not seen by the next."""
        return unpacked(*self._offload.use((call.args, call.kwargs)))

    def observe(
        self,
        index: int,
        before: Callable[[BlockCall], None],
        *,
        calls: int | None = None,
        resumed: ResumedCalls | None = None,
    ) -> None:
        """Run block ``index`` on the inputs recorded by :meth:`enter`, only for hooks; outputs are not kept.

        A hook may raise :class:`Enough` to end a call early; then the next call begins.

        Args:
            before: called with each call (arguments on their device) just before the block runs.
            calls: the number of calls to run; None: all.
            resumed: of the block; each call goes on from the cut of its last run.
        """
        for number, (_, call) in enumerate(self._calls[:calls]):
            args, kwargs = self._arguments(call)
            before(BlockCall(call.batch, args, kwargs))
            with suppress(Enough), torch.no_grad():
                self._call(index, number, args, kwargs, resumed)

    def run(
        self,
        index: int,
        before: Callable[[BlockCall], None] | None = None,
        *,
        last: bool = False,
        resumed: ResumedCalls | None = None,
    ) -> None:
        """Run block ``index`` on the inputs recorded by :meth:`enter`, and keep its outputs for the next block.

        Args:
            before: as in :meth:`observe`.
            last: free each input after its use; only :meth:`enter` may follow.
            resumed: as in :meth:`observe`.
        """
        for number, (item, call) in enumerate(self._calls):
            args, kwargs = self._arguments(call)
            if last:
                self._calls[number] = (item, BlockCall(call.batch, (), {}))
            if before is not None:
                before(BlockCall(call.batch, args, kwargs))
            entered = contents(args, kwargs)
            with torch.no_grad():
                item.output = self._offload.keep(self._call(index, number, args, kwargs, resumed))
            if last and resumed is not None:
                resumed.forget(number)
            item.left = {**item.left, **self._offload.keep(left(entered, args, kwargs))}
            del args, kwargs, call, entered

    def _call(self, index: int, number: int, args: Any, kwargs: Any, resumed: ResumedCalls | None) -> Any:
        return self._blocks[index](*args, **kwargs) if resumed is None else resumed.run(number, args, kwargs)
