"""Checks that the parts of a packed weight agree; every weight passes here before it reaches a kernel."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ecoflap.errors import CheckpointError
from ecoflap.model.packed.columns import MOST
from ecoflap.model.packed.format import GROUP_STEP, STORED, PackedWeight, chunks
from ecoflap.model.packed.nibbles import BLOCK, row_bytes

_LARGEST = 1 << 48  # a dimension; larger ones could overflow in products


def check(packed: PackedWeight, name: str) -> None:
    """Raises CheckpointError, with the layer's ``name``, unless all parts agree."""
    if reason := _fault(packed):
        raise CheckpointError(f"the packed weight '{name}' is damaged: {reason}; download or pack it again")


def from_tensors(tensors: dict[str, Tensor], name: str, group_size: int = 0) -> PackedWeight:
    """A weight from its stored parts. Raises CheckpointError if a part is missing, or the parts disagree."""
    missing = [part for part in ("compressed", "bitmask", "row_offsets", "shape") if part not in tensors]
    if missing:
        raise CheckpointError(f"the packed weight '{name}' lacks its {missing[0]}: download or pack it again")
    shape = tensors["shape"]
    if shape.dtype not in (torch.int64, torch.int32) or shape.dim() != 1 or not 0 < len(shape) <= 8:
        raise CheckpointError(f"the packed weight '{name}' has no readable shape: download or pack it again")
    packed = PackedWeight(
        tensors["compressed"],
        tensors["bitmask"],
        tensors["row_offsets"],
        tuple(shape.tolist()),
        tensors.get("scales"),
        group_size if "scales" in tensors else 0,
        tensors.get("column_scales"),
    )
    check(packed, name)
    return packed


def _fault(packed: PackedWeight) -> str:
    shape, values, mask = packed.shape, packed.compressed, packed.bitmask
    if not shape or any(not 0 <= size <= _LARGEST for size in shape):
        return f"its shape is {list(shape)}"
    rows, columns = prod(shape[:-1]), shape[-1]
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-columns // 8)):
        return f"its bitmask is {mask.dtype} {list(mask.shape)} for a weight of {list(shape)}"
    if values.dim() != 1:
        return f"its values have {values.dim()} dimensions"
    if reason := _scales_fault(packed, rows, columns):
        return reason
    offsets = packed.row_offsets
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (rows,):
        return f"its row_offsets are {offsets.dtype} {list(offsets.shape)} for {rows} rows"
    if columns % 8 and rows and bool((mask[:, -1] >> (columns % 8)).any()):
        return "its bitmask has bits behind the last column"
    sizes = torch.cat([_stored_sizes(part, packed.values) for part in chunks(mask)]) if rows else offsets
    if not torch.equal(sizes.cumsum(0) - sizes, offsets):
        return "bitmask and row_offsets disagree"
    if (total := int(sizes.sum())) != len(values):
        return f"its bitmask tells of {total} values, and there are {len(values)}"
    return ""


def _scales_fault(packed: PackedWeight, rows: int, columns: int) -> str:
    dtype, scales, size = packed.compressed.dtype, packed.scales, packed.group_size
    if (dtype in STORED.values()) != (scales is not None) or not (dtype.is_floating_point or scales is not None):
        return f"its values are {dtype} {'without' if scales is None else 'with'} scales"
    if scales is None:
        return "" if packed.column_scales is None else "it has column_scales and no scales"
    if size < 0 or size % GROUP_STEP:
        return f"its scales are for {size} columns each"
    if dtype == torch.int8 and bool((packed.compressed == -128).any()):
        return "it holds the value -128, which is not used"
    groups = -(-columns // size) if size else 1
    if scales.dtype != torch.float32 or tuple(scales.shape) != (rows, max(groups, 1)):
        return f"its scales are {scales.dtype} {list(scales.shape)}, expected float32 {[rows, groups]}"
    if not bool(torch.isfinite(scales).all()):
        return "its scales are not finite"
    return _column_scales_fault(packed.column_scales, (prod(packed.shape[:-2]), columns))


def _column_scales_fault(scales: Tensor | None, size: tuple[int, int]) -> str:
    if scales is None:
        return ""
    if not scales.dtype.is_floating_point or tuple(scales.shape) != size:
        return f"its column_scales are {scales.dtype} {list(scales.shape)}, expected {list(size)}"
    parts = torch.frexp(scales.float())
    whole = (parts.mantissa == 0.5) & ((parts.exponent - 1).abs() <= MOST)
    return "" if bool(whole.all()) else f"its column_scales are no powers of two up to {2**MOST}"


def _stored_sizes(mask: Tensor, values: str) -> Tensor:
    """Number of stored values, or of bytes of 4-bit codes, in each row of a mask of (R, B) bytes."""
    if values != "int4":
        return popcount(mask)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % (BLOCK // 8)))
    return row_bytes(popcount(padded.reshape(-1, BLOCK // 8)).view(len(mask), padded.shape[1] // (BLOCK // 8)))


def popcount(mask: Tensor) -> Tensor:
    """Number of set bits in each row of (R, B) bytes, as int64."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)
