"""Backward passes that keep only the inputs of each block, and compute the rest of it again when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ecoflap.network.forward import Forward, forward_replaced
from ecoflap.network.heap import trim

_TRIM_EVERY = 2  # calls of blocks


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside the context, the graph of each of these blocks is dropped after its forward and rebuilt in the backward.

    The activations that a backward needs are then those of one block and the inputs of all (Chen et al. 2016, "Training
    Deep Nets with Sublinear Memory Cost"), for one more forward. Gradients are the same.

    The heap is trimmed after every few blocks, without which most of what their forwards freed stayed with the process
    (SmolLM2-135M, 8 × 128 tokens: 300 MiB at the end of the forward for 70 MiB in use).

    Args:
        model: without dropout (eval mode): random numbers are not replayed.
        blocks: paths of blocks that don't contain one another.
    """

    calls = count(1)

    def recomputed(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            found = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            if next(calls) % _TRIM_EVERY == 0:
                trim()
            return found

        return run

    with ExitStack() as wraps:
        for path in blocks:
            wraps.enter_context(forward_replaced(model.get_submodule(path), recomputed))
        yield
