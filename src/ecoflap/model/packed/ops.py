"""Defines the product with a packed weight as a torch operator: CPU kernels, or a fallback that unpacks rows."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ecoflap.model.packed import kernels
from ecoflap.model.packed.columns import scaled
from ecoflap.model.packed.format import STORED, PackedWeight, unpack_rows, unpack_weight

_TILE = 8 << 20  # bytes of rows that are unpacked at a time, so that they are still in the cache when multiplied
_PARTS = "Tensor compressed, Tensor bitmask, Tensor row_offsets, Tensor scales"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("ecoflap", "DEF")  # type: ignore[no-untyped-call]
_scratch = threading.local()


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, as ``torch.nn.functional.linear`` with the dense weight; differentiable in ``x``.

    Args:
        x: (..., C), of a floating dtype; the result (..., R) has the same dtype.
        weight: (R, C).
        bias: (R,).
    """
    none = weight.compressed.new_empty(0, dtype=torch.float32)
    scales = none if weight.scales is None else weight.scales
    parts = (weight.compressed, weight.bitmask, weight.row_offsets, scales)
    return multiply(scaled(x, weight.column_scales), *parts, none if bias is None else bias, weight.group_size)


def multiply(
    x: Tensor, compressed: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor, bias: Tensor, group_size: int
) -> Tensor:
    """As :func:`packed_linear`, for ``x`` times the column scales; empty tensors for missing scales or bias."""
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        found: Tensor = _WithGradient.apply(x, compressed, bitmask, offsets, scales, bias, group_size)  # type: ignore[no-untyped-call]
        return found
    result: Tensor = torch.ops.ecoflap.packed_linear(x, compressed, bitmask, offsets, scales, bias, group_size)
    return result


class _WithGradient(torch.autograd.Function):
    """The gradient of a product with a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts[:4])
        ctx.shape, ctx.group_size = x.shape, parts[5]
        result: Tensor = torch.ops.ecoflap.packed_linear(x, *parts)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        compressed, bitmask, offsets, scales = ctx.saved_tensors
        weight = _weight(ctx.shape[-1], compressed, bitmask, offsets, scales, ctx.group_size)
        of_x = gradient @ unpack_weight(weight, gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
        return of_x, None, None, None, None, of_bias, None


def _weight(
    columns: int, compressed: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor, group_size: int
) -> PackedWeight:
    shape = (len(offsets), columns)
    return PackedWeight(compressed, bitmask, offsets, shape, scales if scales.numel() else None, group_size)


def _tiled(
    x: Tensor, compressed: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor, bias: Tensor, group_size: int
) -> Tensor:
    """Unpack groups of rows into a reused buffer, and multiply by them.

    Computes in float32 on processors without fast bfloat16 or float16 products, where that is several times faster.
    """
    rows, columns = len(offsets), x.shape[-1]
    tokens = x.numel() // max(columns, 1)
    on_cpu = x.device.type == "cpu"
    fast = on_cpu and kernels.load() is not None and x.dtype in _KERNEL_DTYPES and compressed.dtype in (
        *_KERNEL_DTYPES, *STORED.values(),
    )  # fmt: skip
    if fast and tokens <= kernels.most_tokens() and not x.is_contiguous():
        return multiply(x.contiguous(), compressed, bitmask, offsets, scales, bias, group_size)
    dtype = x.dtype if not on_cpu or (x.dtype is torch.bfloat16 and kernels.bf16_products()) else _wide(x.dtype)
    flat = x.reshape(tokens, columns).to(dtype)
    weight = _weight(columns, compressed, bitmask, offsets, scales, group_size)
    result = x.new_empty(tokens, rows)
    step = max(1, _TILE // max(columns * dtype.itemsize, 1))
    buffer = _buffer(min(step, rows) * columns, dtype, x.device)
    for low in range(0, rows, step):
        tile = buffer[: (min(low + step, rows) - low) * columns].view(-1, columns)
        if fast:
            torch.ops.ecoflap.unpack_rows(tile, compressed, bitmask, offsets, scales, group_size, low)
        else:
            unpack_rows(weight, low, tile.zero_())
        part = bias[low : low + len(tile)].to(dtype) if bias.numel() else None
        result[:, low : low + len(tile)] = linear(flat, tile, part)
    return result.view(*x.shape[:-1], rows)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for ``size`` numbers, reused by all calls of a thread: new pages would cost more than the unpacking."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    found: Tensor | None = getattr(_scratch, "bytes", None)
    if found is None or found.numel() < size * dtype.itemsize:
        found = _scratch.bytes = torch.empty(max(size * dtype.itemsize, _TILE), dtype=torch.uint8)
    return found[: size * dtype.itemsize].view(dtype)


def _unpack_rows(
    dense: Tensor, compressed: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor, group_size: int, first: int
) -> None:
    weight = _weight(dense.shape[-1], compressed, bitmask, offsets, scales, group_size)
    unpack_rows(weight, first, dense.zero_())


def _shape_of_product(
    x: Tensor, compressed: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor, bias: Tensor, group_size: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], offsets.shape[0])


def _register(library: Any) -> None:
    library.define(f"packed_linear(Tensor x, {_PARTS}, Tensor bias, int group_size) -> Tensor")
    library.define(f"packed_linear_tiled(Tensor x, {_PARTS}, Tensor bias, int group_size) -> Tensor")
    library.define(f"unpack_rows(Tensor(a!) dense, {_PARTS}, int group_size, int first) -> ()")
    for name, function in {"packed_linear": _tiled, "packed_linear_tiled": _tiled, "unpack_rows": _unpack_rows}.items():
        library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake("ecoflap::packed_linear", _shape_of_product, lib=library)
    kernels.load()  # they replace the first and the last operator on the CPU


_register(_library)
