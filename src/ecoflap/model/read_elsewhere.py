"""Weights of an offloaded model that something reads outside of their module's forward, before which hooks load them.

A module's other methods may use its bias (JetMoE's attention), or a parent asks an embedding's weight for its device
(Llama 4). Such weights have to be in memory all the time.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ecoflap.model.block_lists import block_lists
from ecoflap.model.offload import is_offloaded, load_for_good

T = TypeVar("T")


def with_weights(model: nn.Module, forward: Callable[[], T]) -> T:
    """The result of ``forward()``, a forward of ``model``; what it reads elsewhere is loaded for good, as it shows.

    In blocks that holds for vectors alone: matrices there are too many to stay in memory.

    Raises:
        RuntimeError: a weight was not in memory, and it is not known which, or it is a matrix of a block.
    """
    while True:
        try:
            return forward()
        except RuntimeError as error:
            if "meta" not in str(error) or not is_offloaded(model) or not _load_where_it_failed(model, error):
                raise


def _load_where_it_failed(model: nn.Module, error: RuntimeError) -> bool:
    """Loads the weights of the module in whose code a forward failed, and of those of its class and name elsewhere."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [paths[id(frame["self"])] for frame in frames if id(frame.get("self")) in paths]
    if not running:
        return False
    failed, leaf = model.get_submodule(running[-1]), running[-1].rpartition(".")[2]
    inside = tuple(f"{path}." for found in block_lists(model, None) for path in found.elements)
    loaded = False
    for path, module in model.named_modules():
        if type(module) is type(failed) and path.rpartition(".")[2] == leaf:
            wide = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
            if not (wide and path.startswith(inside)):
                loaded |= load_for_good(model, module)
    return loaded
