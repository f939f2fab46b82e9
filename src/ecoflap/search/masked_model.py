"""Computes with masked weights, block by block, without changing the model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.patching import Forward, forward_replaced
from ecoflap.model.slices import stored_matrix
from ecoflap.model.swapping import layers_swapped

_READY = 1 << 30  # up to this number of bytes, masked weights are kept, since making them takes time for every batch


class PackedMask:
    """A bool mask of any shape, stored with one bit per entry."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        flat = mask.flatten().to(torch.uint8)
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
        self._bits = (flat << _places(flat)).sum(dim=1, dtype=torch.uint8)

    def unpacked(self) -> Tensor:
        """The mask."""
        bits = (self._bits[:, None] >> _places(self._bits)) & 1
        return bits.flatten()[: self.shape.numel()].view(self.shape).bool()


class _Partly(torch.autograd.Function):
    """W + t·(changed W − W) at t = 1 with its derivative by t, without arithmetic on the weights in the forward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, changed: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(changed, weight)
        return changed.view_as(changed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        changed, weight = ctx.saved_tensors
        return (changed - weight).mul_(outer).sum(dtype=torch.float32), None, None


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


class MaskedModel:
    """Context in which blocks run with their weights masked.

    If the layers take at most 1 GiB, their masked weights are kept. For a larger model the masked weights of a block
    exist only while it runs, and one bit per weight is kept. The parameters are not changed. Layers without a mask are
    dense.

    Args:
        model: in eval mode.
        anatomy: its layers.
        fp32: the model computes in fp32, for any dtype of its weights.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, fp32: bool = False) -> None:
        self._model, self._fp32 = model, fp32
        self._masks: dict[str, PackedMask | Tensor] = {}
        self._dense: frozenset[str] = frozenset()
        self._parts: dict[str, Tensor] = {}
        self._wraps = ExitStack()
        self._inside: dict[str, list[Layer]] = {}
        self._whole = sum(stored_matrix(model, layer.name).nbytes for layer in anatomy.layers) <= _READY
        for layer in anatomy.layers:
            for block in anatomy.replayable:
                if any(module.startswith(f"{block}.") for module in layer.modules):
                    self._inside.setdefault(block, []).append(layer)

    def __enter__(self) -> MaskedModel:
        for block, layers in self._inside.items():
            wrap = partial(self._wrapper, layers)
            self._wraps.enter_context(forward_replaced(self._model.get_submodule(block), wrap))
        return self

    def __exit__(self, *exception: object) -> None:
        self._wraps.close()

    def blocks_of(self, layer: str) -> tuple[str, ...]:
        """The blocks that run with this layer's weight."""
        return tuple(block for block, layers in self._inside.items() if any(one.name == layer for one in layers))

    def set(self, masks: Mapping[Layer, Tensor]) -> None:
        """Set masks (out, in) bool, True = kept, or whole weights (out, in), of these layers; others keep theirs."""
        for layer, given in masks.items():
            stand_in = given.t() if layer.transposed else given
            if stand_in.dtype != torch.bool:
                self._masks[layer.name] = stand_in
            elif self._whole:
                self._masks[layer.name] = stored_matrix(self._model, layer.name).masked_fill(~stand_in, 0)
            else:
                self._masks[layer.name] = PackedMask(stand_in)

    def clear(self) -> None:
        """Remove all masks."""
        self._masks.clear()

    @contextmanager
    def dense(self, layers: Collection[str]) -> Iterator[None]:
        """Context in which these layers are dense."""
        outer, self._dense = self._dense, self._dense | frozenset(layers)
        try:
            yield
        finally:
            self._dense = outer

    @contextmanager
    def removed_part(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which layer ``name`` uses W + t·(masked W − W), with the scalar t = ``parts[name]`` = 1.

        The value is that of the masked weights; the loss's derivative by t is ⟨∇L, masked W − W⟩.
        """
        outer, self._parts = self._parts, dict(parts)
        try:
            yield
        finally:
            self._parts = outer

    def _wrapper(self, layers: list[Layer], forward: Forward) -> Callable[..., Any]:
        def masked(*args: Any, **kwargs: Any) -> Any:
            masked = [layer for layer in layers if layer.name in self._masks and layer.name not in self._dense]
            with layers_swapped(self._model, ((layer, self._stand_in(layer)) for layer in masked)):
                return forward(*args, **kwargs)

        return masked

    def _stand_in(self, layer: Layer) -> Tensor:
        """The weight that the layer uses, as its matrix is stored."""
        packed, part = self._masks[layer.name], self._parts.get(layer.name)
        weight = stored_matrix(self._model, layer.name)
        stand_in = weight.masked_fill(~packed.unpacked(), 0) if isinstance(packed, PackedMask) else packed
        if part is not None:
            if self._fp32:  # so that the derivative by t is fp32, too
                stand_in, weight = stand_in.float(), weight.float()
            stand_in = _Partly.apply(part, stand_in, weight)  # type: ignore[no-untyped-call]
        return stand_in
