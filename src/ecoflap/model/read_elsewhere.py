"""Weights of an offloaded model that something reads outside of their module's forward, before which hooks load them.

A module's other methods may use its bias (JetMoE's attention), a parent asks an embedding's weight for its device
(Llama 4), or multiplies by a child's matrices (DBRX).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.model.block_lists import block_lists
from ecoflap.model.offload import in_memory, is_offloaded, load_for_good
from ecoflap.model.trace import tensors_in

T = TypeVar("T")


def with_weights(model: nn.Module, forward: Callable[[], T]) -> T:
    """The result of ``forward()``, a forward of ``model``; what it reads elsewhere will be in memory then, as it shows.

    What a module itself holds, but for matrices inside blocks, is loaded for good. Other weights are in memory from now
    on as long as the module runs in whose code they are read.

    Raises:
        RuntimeError: a weight was not in memory, and it is not known which, or it is a block's and read from outside.
    """
    if not is_offloaded(model):
        return forward()
    while True:
        reads = _MetaReads()
        try:
            with reads:
                return forward()
        except RuntimeError as error:
            if "meta" not in str(error) or not (_mend(model, error) or _load_read(model, reads.failed)):
                raise


def _mend(model: nn.Module, error: RuntimeError) -> bool:
    """Sees to the innermost module in whose code a forward failed and of which something can be mended."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [paths[id(frame["self"])] for frame in frames if id(frame.get("self")) in paths]
    return any(_mend_like(model, path) for path in dict.fromkeys(reversed(running)))


def _mend_like(model: nn.Module, failed: str) -> bool:
    """Sees to the module at this path, and to those of its class and name elsewhere; False if nothing is left to do."""
    kind, leaf = type(model.get_submodule(failed)), failed.rpartition(".")[2]
    blocks = {path for found in block_lists(model, None) for path in found.elements}
    mended = False
    for path, module in model.named_modules():
        if type(module) is kind and path.rpartition(".")[2] == leaf:
            inside = path in blocks or path.startswith(tuple(f"{block}." for block in blocks))
            holds_blocks = not path or any(block.startswith(f"{path}.") for block in blocks)
            own = list(module.parameters(recurse=False))
            stays = bool(own) and not (inside and any(parameter.dim() > 1 for parameter in own))
            if stays and load_for_good(model, module):
                mended = True
            elif not holds_blocks and not isinstance(module.__dict__.get("forward"), _Held):
                module.__dict__["forward"] = _Held(model, path)  # as accelerate does it
                mended = True
    return mended


def _load_read(model: nn.Module, weights: Sequence[Tensor]) -> bool:
    """Loads these weights for good where no block holds them: a module around whole blocks read them."""
    blocks = tuple(f"{path}." for found in block_lists(model, None) for path in found.elements)
    owners = [
        module
        for path, module in model.named_modules()
        if not path.startswith(blocks) and any(one is p for p in module._parameters.values() for one in weights)
    ]
    return sum(load_for_good(model, owner) for owner in owners) > 0


class _MetaReads(TorchFunctionMode):
    """Inside, an operation that makes values of a weight that is not in memory is an error.

    torch does some of them without a word (``F.linear`` of a tensor and a weight on the meta device, on a CPU), and
    their result is whatever lay in memory.

    Attributes:
        failed: the weights that are not in memory among what the operation reads that failed; of a view, what it shows.
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


class _Held:
    """A module's forward with all weights below it in memory meanwhile."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model, self._path, self._forward = model, path, model.get_submodule(path).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with in_memory(self._model, self._path):
            return self._forward(*args, **kwargs)
