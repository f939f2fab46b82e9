"""Finds weights of an offloaded model that are read outside of their module's forward, and has them in memory there.

Hooks load a module's weights only for its forward. But another method of the module may use its bias (JetMoE's
attention), or a parent may read an embedding's weight (Llama 4) or multiply by a child's matrices (DBRX).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.errors import InvalidOption
from ecoflap.model.block_lists import block_lists
from ecoflap.model.offload import in_memory, is_offloaded, load_for_good
from ecoflap.model.trace import tensors_in
from ecoflap.support.text import first_line

T = TypeVar("T")


def with_weights(model: nn.Module, forward: Callable[[], T]) -> T:
    """Call ``forward()``, a forward of ``model``, again until no weight that it reads is missing; return its result.

    If code of a module reads a weight that is not in memory, the module's own parameters are loaded for good, unless
    they are matrices inside a block. Otherwise, all weights below the module are in memory while it runs.

    Raises:
        InvalidOption: a weight was not in memory, and it is unknown which, or it is a block's and read from outside.
    """
    if not is_offloaded(model):
        return forward()
    while True:
        reads = _MetaReads()
        try:
            with reads:
                return forward()
        except RuntimeError as error:
            if not misses_weights(model, error):
                raise
            if not (_load_on_stack(model, error) or _load_read(model, reads.failed)):
                raise InvalidOption(
                    f"{type(model).__name__} reads weights that accelerate does not load for it "
                    f"({type(error).__name__}: {first_line(error)}): it can't be used with --device-map"
                ) from error


def misses_weights(model: nn.Module, error: Exception) -> bool:
    """Whether a forward of ``model`` raised ``error`` because a weight was not in memory."""
    return isinstance(error, RuntimeError) and "meta" in str(error) and is_offloaded(model)


def _load_on_stack(model: nn.Module, error: RuntimeError) -> bool:
    """Load weights for the innermost module on the error's call stack for which that is possible."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [paths[id(frame["self"])] for frame in frames if id(frame.get("self")) in paths]
    return any(_load_for_class(model, path) for path in dict.fromkeys(reversed(running)))


def _load_for_class(model: nn.Module, failed: str) -> bool:
    """Load weights for the module at this path and those of the same class and name; False if nothing is left to do."""
    kind, leaf = type(model.get_submodule(failed)), failed.rpartition(".")[2]
    blocks = {path for found in block_lists(model, None) for path in found.elements}
    changed = False
    for path, module in model.named_modules():
        if type(module) is kind and path.rpartition(".")[2] == leaf:
            inside = path in blocks or path.startswith(tuple(f"{block}." for block in blocks))
            holds_blocks = not path or any(block.startswith(f"{path}.") for block in blocks)
            own = list(module.parameters(recurse=False))
            stays = bool(own) and not (inside and any(parameter.dim() > 1 for parameter in own))
            if stays and load_for_good(model, module):
                changed = True
            elif not holds_blocks and not isinstance(module.__dict__.get("forward"), _ForwardInMemory):
                module.__dict__["forward"] = _ForwardInMemory(model, path)  # as accelerate does
                changed = True
    return changed


def _load_read(model: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Load these weights for good if no block holds them: a module that contains whole blocks read them."""
    blocks = tuple(f"{path}." for found in block_lists(model, None) for path in found.elements)
    owners = [
        module
        for path, module in model.named_modules()
        if not path.startswith(blocks) and any(one is p for p in module._parameters.values() for one in weights)
    ]
    return sum(load_for_good(model, owner) for owner in owners) > 0


class _MetaReads(TorchFunctionMode):
    """Context in which an operation that computes values from a weight on the meta device raises an error.

    torch computes some of them without an error (``F.linear`` of a CPU tensor and a weight on the meta device), and
    returns uninitialised memory.

    Attributes:
        failed: the weights on the meta device that the failed operation reads; for a view, its base.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        meta = [one for one in tensors_in((args, kwargs)) if one.is_meta]
        try:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result.is_meta and meta:
                raise RuntimeError(f"{getattr(func, '__name__', func)} reads a weight on the meta device")
        except RuntimeError:
            self.failed = self.failed or [one if one._base is None else one._base for one in meta]
            raise
        return result


class _ForwardInMemory:
    """A module's forward during which all weights below it are in memory."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model, self._path, self._forward = model, path, model.get_submodule(path).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with in_memory(self._model, self._path):
            return self._forward(*args, **kwargs)
