"""What stage 2 needs beside the model, from shapes alone and one forward of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.block_runner import Enough, Run
from ecoflap.model.parts import Anatomy, Block, Layer
from ecoflap.model.patching import Forward, cache_disabled, forward_replaced
from ecoflap.model.resumed import ResumedCalls
from ecoflap.model.trace import evaluating, tensors_in
from ecoflap.pruning.sequential import COPIES, EXPERTS_ROOM
from ecoflap.statistics.gather import NUMBERS
from ecoflap.statistics.watching import inputs_watched

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes above those of the model at the peak of stage 2.

    Attributes:
        inputs: what one block gets for all batches, and the outputs of one batch: where the model is, unless offloaded.
        statistics: of one block, a sum for each distinct input; of experts those that are gathered at a time, with what
            their few tokens are filled up with.
        working: fp32 copies while one layer is pruned.
        forward: what one block makes of one batch: inputs and outputs of its layers.
    """

    inputs: int
    statistics: int
    working: int
    forward: int

    @property
    def total(self) -> int:
        """The peak: a block is run and its layers are pruned in turns. Sums of batches are made in two parts."""
        return self.inputs + max(2 * self.statistics + self.forward, self.statistics + self.working)


@dataclass
class _Seen:
    """What one forward of one batch showed of a block."""

    arguments: int = 0
    forward: int = 0
    kept: list[int] = field(default_factory=list)  # bytes of each distinct input
    between: list[int] = field(default_factory=list)  # what a run that is cut at each of these leaves for the next one
    inputs: list[Tensor] = field(default_factory=list)  # distinct ones, as long as the block runs
    columns: list[int] = field(default_factory=list)
    experts: set[str] = field(default_factory=set)  # kinds of experts' layers, one for each distinct input


def expected_memory(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], run: Run, needs: str, offload: str = "none"
) -> Memory:
    """The expectation for :func:`ecoflap.pruning.walk.walk`; the formula is in ``docs/memory.md``.

    Runs one forward of the first batch up to the last block.

    Args:
        batches: mappings of tensors; those after the first are taken to need as much for each number in them.
        run: runs the model on a batch (an objective).
        needs: what the criterion asks for: "none", "norm", "gram" or "pair" (in sequential order).
        offload: "cpu" and "disk" keep only one batch's inputs where the model is.
    """
    if needs == "none" or not len(batches):
        return Memory(0, 0, max((working_bytes(layer, needs) for layer in anatomy.layers), default=0), 0)
    found = [_of_block(block, seen, needs) for block, seen in _watch(model, anatomy, batches[0], run)]
    share = sum(map(_numbers, batches)) / max(_numbers(batches[0]), 1) if offload == "none" else 1.0
    streams = 2 if needs == "pair" else 1  # the dense model's samples and those of the pruned one
    whole = [
        Memory(round(streams * (share + 1) * one.inputs + share * kept), one.statistics, one.working, one.forward)
        for one, kept in found
    ]
    return max(whole, key=lambda one: one.total)


def _of_block(block: Block, seen: _Seen, needs: str) -> tuple[Memory, int]:
    """Of one batch; and, in the sequential order, the most bytes that wait in the block between two of its runs.

    These are the inputs of layers to come in the dense model, and what the run so far left for the next one.
    """
    numbers = NUMBERS[needs]
    each = [FP32 * numbers(columns) for columns in seen.columns]
    statistics = max(each, default=0) if needs == "pair" else sum(each)  # one input after the other
    # The sum of a peak counts statistics twice; those of experts are counted with all their copies.
    groups = _at_a_time(block, seen, needs)
    room = [_of_experts(found, numbers) // 2 for found in groups]
    apart = needs == "pair" or any(_of_experts(found, numbers) >= EXPERTS_ROOM for found in groups)
    statistics = max([statistics, *room]) if apart else statistics + sum(room)
    working = max((working_bytes(layer, needs) for layer in block.layers), default=0)
    waiting = [sum(seen.kept), *(sum(seen.kept[place:]) + left for place, left in enumerate(seen.between))]
    return Memory(seen.arguments, statistics, working, seen.forward), max(waiting) if needs == "pair" else 0


def _at_a_time(block: Block, seen: _Seen, needs: str) -> list[dict[str, int]]:
    """Columns of the experts' inputs by any names, for each group of layers that is gathered at a time."""
    kinds = [
        {layer.name: layer.shape[1] for layer in block.layers if layer.expert and layer.kind == kind}
        for kind in sorted(seen.experts)
    ]
    if needs == "pair":
        return kinds
    return [{name: columns for of in kinds for name, columns in of.items()}] if kinds else []


def _of_experts(columns: dict[str, int], numbers: Callable[[int], int]) -> int:
    """Bytes that are gathered for experts at a time: of all, or as many as there is room for, or of one."""
    sizes = [COPIES * FP32 * numbers(one) for one in columns.values()]
    return min(sum(sizes), max(EXPERTS_ROOM, *sizes))


def working_bytes(layer: Layer, needs: str) -> int:
    """Fp32 copies and masks while ``layer`` is pruned: of its weight, and of its inputs' second moments."""
    rows, columns = layer.shape
    if needs == "pair":
        # Scaled moments and inverse, with two more matrices while it is made; then seven weights and a mask.
        return max(4 * FP32 * columns**2, 2 * FP32 * columns**2 + (7 * FP32 + 1) * rows * columns)
    if needs != "gram":
        return 3 * FP32 * rows * columns  # scores, the selection's copy of them, masks
    # Factorising holds three more matrices of the moments and some; then the factor stays beside the weight.
    return max(13 * columns**2, FP32 * columns**2 + 3 * FP32 * rows * columns)


def _watch(model: nn.Module, anatomy: Anatomy, batch: Any, run: Run) -> list[tuple[Block, _Seen]]:
    blocks = [block for block in anatomy.blocks if block.layers]
    seen = {block.name: _Seen() for block in blocks}

    def enter(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors_in((args, kwargs))]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}  # views of one count once
        seen[block.name].arguments = max(seen[block.name].arguments, sum(sizes.values()))

    def leave(block: Block, module: nn.Module, args: Any, output: Any) -> None:
        seen[block.name].inputs.clear()
        if block is blocks[-1]:
            raise Enough

    def feed(layer: Layer, x: Tensor) -> None:
        one = seen[layer.block]
        rows, columns = layer.shape
        one.forward += x.nbytes + x.nbytes * rows // columns
        if not any(tensor is x for tensor in one.inputs):
            one.inputs.append(x)
            one.kept.append(x.nbytes)
            if layer.expert:
                one.experts.add(layer.kind)
            else:
                one.columns.append(columns)

    with ExitStack() as hooks, evaluating(model), cache_disabled(model), torch.no_grad(), suppress(Enough):
        for block in blocks:
            module = model.get_submodule(block.name)
            handles = [module.register_forward_pre_hook(partial(enter, block), with_kwargs=True),
                       module.register_forward_hook(partial(leave, block))]  # fmt: skip
            for handle in handles:
                hooks.callback(handle.remove)
        hooks.enter_context(inputs_watched(model, [layer for block in blocks for layer in block.layers], feed))
        for block in blocks:
            if any(layer.expert or layer.stacked or layer.uncalled for layer in block.layers):
                continue  # each run of it begins at the beginning
            wrap = partial(_with_cuts, model, block, seen[block.name])
            hooks.enter_context(forward_replaced(model.get_submodule(block.name), wrap))
        run(model, batch)
    return [(block, seen[block.name]) for block in blocks]


def _with_cuts(model: nn.Module, block: Block, seen: _Seen, forward: Forward) -> Forward:
    """The block's forward, and after it a run up to each distinct input of its layers, for what such a run leaves."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output, kept, columns = forward(*args, **kwargs), list(seen.kept), list(seen.columns)
        within, numbers = seen.forward, range(len(kept))
        calls = ResumedCalls(_Bare(model.get_submodule(block.name), forward), ())
        for number in numbers:
            inputs: list[Tensor] = []

            def reach(module: nn.Module, args: Any, number: int = number, inputs: list[Tensor] = inputs) -> None:
                inputs += [] if any(tensor is args[0] for tensor in inputs) else [args[0]]
                if len(inputs) > number:
                    calls.cut()
                    raise Enough

            with ExitStack() as hooks, suppress(Enough):
                for layer in block.layers:
                    hook = model.get_submodule(layer.module).register_forward_pre_hook(reach)
                    hooks.callback(hook.remove)
                calls.run(number, args, kwargs)
            seen.between.append(calls.kept_bytes(number, tensors_in((args, kwargs))))
            calls.forget(number)
        seen.kept, seen.columns, seen.forward = kept, columns, within
        return output

    return run


class _Bare(nn.Module):
    """A block under its plain forward, without its hooks."""

    def __init__(self, block: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.block, self._forward = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _numbers(batch: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in(batch))
