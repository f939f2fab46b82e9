"""How much replay can save at most: the arithmetic of a probe with and without it, counted from shapes alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ecoflap.model.parts import Layer
from ecoflap.model.patching import differentiable_attention


def block_flops(model: nn.Module, blocks: Sequence[str], run: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """Floating-point operations of each block in one forward, and those outside of all blocks; meta tensors will do.

    No parameter of the model wants a gradient afterwards: the counter would follow it.
    """
    model.requires_grad_(False)
    found = dict.fromkeys(blocks, 0)
    # Attention by elementary operators: a fused one of the processor's would not be counted.
    with differentiable_attention(), FlopCounterMode(display=False) as counter, ExitStack() as hooks:
        for name in blocks:

            def enter(*_: Any, name: str = name) -> None:
                found[name] -= counter.get_total_flops()

            def leave(*_: Any, name: str = name) -> None:
                found[name] += counter.get_total_flops()

            block = model.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        run()
    return found, counter.get_total_flops() - sum(found.values())


def block_seconds(model: nn.Module, blocks: Sequence[str], run: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """Seconds of the processor in each block in one forward (the second one), and those outside of all blocks."""
    found = dict.fromkeys(blocks, 0.0)
    run()
    with ExitStack() as hooks:
        for name in blocks:

            def enter(*_: Any, name: str = name) -> None:
                found[name] -= time.process_time()

            def leave(*_: Any, name: str = name) -> None:
                found[name] += time.process_time()

            block = model.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        begin = time.process_time()
        run()
        whole = time.process_time() - begin
    return found, whole - sum(found.values())


def replay_bound(flops: Mapping[str, float], outside: float, layers: Sequence[Layer]) -> float:
    """Operations (or seconds) of one plain probe of each layer to those of one with replay.

    A probe with replay computes the block that holds the layer, all blocks after it, and what is outside of blocks
    (patches, embeddings, head): of one chain of blocks, nothing less can be right.

    Args:
        flops: of each block, in the order in which they are called.
    """
    after: dict[str, int] = {}
    rest = outside
    for name in reversed(flops):
        rest += flops[name]
        after[name] = rest
    return rest * len(layers) / sum(after[layer.block] for layer in layers)
