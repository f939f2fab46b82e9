"""Defines the bitmask format of one sparse weight: its nonzeros in order, and a mask with one bit per weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption
from ecoflap.model.packed.columns import column_scales
from ecoflap.model.packed.nibbles import BLOCK, block_counts, joined, parted, row_bytes
from ecoflap.model.packed.rounding import meaning, rounded
from ecoflap.support.ranges import check_count

PARTS = (
    "compressed",
    "bitmask",
    "row_offsets",
    "shape",
    "scales",
    "column_scales",
)  # stored tensors of a weight; both kinds of scales for rounded values
VALUES = ("auto", "int8", "int4")
GROUP_STEP = 64  # columns that kernels read at a time; a group must not end inside a step
GROUP_SIZES = {"auto": 0, "int8": 0, "int4": 128}  # by default
STORED = {"int8": torch.int8, "int4": torch.uint8}  # dtype of rounded values
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # weights that are processed at a time, to limit memory
_FEW = 0.01  # up to this share of -0 among the weights, they are stored, so that unpacking restores every bit
_WORTH = 0.95  # a weight that would take more than this share of its dense bytes stays dense


@dataclass(frozen=True)
class PackedWeight:
    """One weight of shape (..., C), seen as R rows of C columns.

    Attributes:
        compressed: (nnz,) the nonzero values, row by row, columns ascending. With ``scales`` they are int8, or uint8
            with two 4-bit codes in each byte (see ``nibbles.py``).
        bitmask: (R, ceil(C / 8)) uint8; bit j of byte b is column 8 b + j.
        row_offsets: (R,) int64; index of each row's first value in ``compressed``.
        shape: the dense weight's.
        scales: (R, groups) float32, factors of the rounded values for each row and group of columns.
        group_size: columns that share a scale; 0 for the whole row.
        column_scales: (matrices, C) powers of two, further factors of the columns of each (R / matrices, C) matrix
            (``columns.py``); None without them, as in files up to version 2.
    """

    compressed: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    shape: tuple[int, ...]
    scales: Tensor | None = None
    group_size: int = 0
    column_scales: Tensor | None = None

    @property
    def values(self) -> str:
        """ "auto", "int8" or "int4"."""
        return "auto" if self.scales is None else "int8" if self.compressed.dtype == torch.int8 else "int4"

    @property
    def nbytes(self) -> int:
        """Bytes of the parts, in memory and in files."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The parts by their names in a file."""
        found = {
            "compressed": self.compressed,
            "bitmask": self.bitmask,
            "row_offsets": self.row_offsets,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "scales": self.scales,
            "column_scales": self.column_scales,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def pack_weight(weight: Tensor, values: str = "auto", group_size: int | None = None) -> PackedWeight:
    """Pack ``weight`` of any floating dtype and at least one dimension, on its device.

    Args:
        values: "auto" keeps the nonzeros to the bit (also -0, unless more than 1 % of the weights are -0: then they
            count as zeros). "int8" and "int4" round them (``rounding.py``).
        group_size: columns that share a scale of rounded values, a multiple of 64; 0: the whole row. None: 0 for int8,
            128 for int4.

    Raises:
        InvalidOption: unknown ``values``, an unsupported group size, or weights to round that are not finite.
    """
    group_size = checked_group_size(values, group_size)
    matrix = weight.detach().reshape(prod(weight.shape[:-1]), weight.shape[-1])
    if values == "auto":
        exact = _negative_zeros(matrix) <= _FEW * matrix.numel()
    masks, stored, sizes, scales = [], [], [], []
    by_columns = weight.new_ones(1, 1) if values == "auto" else _column_scales(matrix, weight.shape)
    low = 0
    for rows in chunks(matrix):
        if values == "auto":
            kept, codes = _bits(rows) != 0 if exact else rows != 0, rows
        else:
            codes, scale = rounded(
                rows.float() / _of_rows(by_columns, weight.shape, low, len(rows)), values, group_size
            )
            scales.append(scale)
            kept = codes != 0 if values == "int8" else rows != 0
        masks.append(_to_bits(kept))
        stored.append(joined(codes, kept) if values == "int4" else codes[kept])
        sizes.append(row_bytes(block_counts(kept)) if values == "int4" else kept.sum(dim=1, dtype=torch.int64))
        low += len(rows)
    if not masks:  # no rows: empty parts of the right dtypes
        groups = -(-matrix.shape[1] // group_size) if group_size else 1
        masks = [torch.zeros(0, -(-matrix.shape[1] // 8), dtype=torch.uint8, device=weight.device)]
        stored = [torch.zeros(0, dtype=STORED.get(values, matrix.dtype), device=weight.device)]
        sizes = [torch.zeros(0, dtype=torch.int64, device=weight.device)]
        scales = [] if values == "auto" else [torch.ones(0, max(groups, 1), device=weight.device)]
    size = torch.cat(sizes)
    return PackedWeight(
        torch.cat(stored),
        torch.cat(masks),
        size.cumsum(0) - size,
        tuple(weight.shape),
        torch.cat(scales) if scales else None,
        group_size if scales else 0,
        by_columns if scales else None,
    )


def checked_group_size(values: str, group_size: int | None) -> int:
    """The group size, by default that of ``values``; raises InvalidOption as :func:`pack_weight`."""
    if values not in VALUES:
        raise InvalidOption(f"values '{values}' is not one of {', '.join(VALUES)}")
    size = GROUP_SIZES[values] if group_size is None else group_size
    check_count("the group size", size, least=0, most=2**31)
    if size % GROUP_STEP:
        raise InvalidOption(f"group size {size}: give a multiple of {GROUP_STEP} columns")
    return size


def unpack_weight(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight on the device of the parts; in ``dtype``, by default that of the values (float32 if rounded)."""
    dtype = dtype or (torch.float32 if packed.scales is not None else packed.compressed.dtype)
    rows, columns = len(packed.bitmask), packed.shape[-1]
    dense = torch.zeros(rows, columns, dtype=dtype, device=packed.bitmask.device)
    unpack_rows(packed, 0, dense)
    return dense.reshape(packed.shape)


def unpack_rows(packed: PackedWeight, first: int, dense: Tensor) -> None:
    """Write rows from ``first`` on into ``dense`` (rows, C), which must be zero."""
    rows, columns = dense.shape
    step = max(1, _CHUNK // max(columns, 1))
    ends = torch.cat([packed.row_offsets[1:], packed.row_offsets.new_tensor([len(packed.compressed)])])
    for low in range(0, rows, step):
        high = min(rows, low + step)
        begin, end = int(packed.row_offsets[first + low]), int(ends[first + high - 1])
        kept = _from_bits(packed.bitmask[first + low : first + high], columns)
        stored = packed.compressed[begin:end]
        part = dense[low:high]
        if packed.scales is not None:
            scales = packed.scales[first + low : first + high].repeat_interleave(packed.group_size or columns, dim=1)
            codes = parted(stored, kept) if packed.values == "int4" else stored
            stored = meaning(codes, scales[:, :columns][kept])
        if packed.column_scales is not None:
            factors = _of_rows(packed.column_scales, packed.shape, first + low, high - low)
            stored = stored * factors.expand(high - low, columns)[kept]
        _bits(part)[kept] = _bits(stored.to(dense.dtype))


def packed_bytes(weight: Tensor, values: str = "auto", group_size: int | None = None) -> int:
    """Bytes of ``weight`` after :func:`pack_weight`, without packing it; for int8 and int4 an upper bound."""
    columns, rows = weight.shape[-1], prod(weight.shape[:-1])
    kept = sum(int(part.count_nonzero()) for part in chunks(weight.detach().reshape(rows, columns)))
    size = {"auto": weight.element_size(), "int8": 1, "int4": 0.5}[values]
    rest = 0.5 * rows * -(-columns // BLOCK) if values == "int4" else 0  # bytes that may hold a single code
    group_size = checked_group_size(values, group_size)
    groups = max(1, -(-columns // group_size)) if group_size else 1
    scales = 0 if values == "auto" else 4 * rows * groups
    factors = 0 if values == "auto" else 2 * columns * prod(weight.shape[:-2])
    return int(kept * size + rest) + rows * -(-columns // 8) + 8 * rows + 8 * weight.dim() + scales + factors


def worth_packing(weight: Tensor, values: str = "auto", group_size: int | None = None) -> bool:
    """Whether packing makes ``weight`` smaller by more than a few per cent."""
    if weight.dim() < 2 or not weight.is_floating_point():
        return False
    return packed_bytes(weight, values, group_size) < _WORTH * weight.nbytes


def _column_scales(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The column scales (matrices, C) of a stack of ``shape``, whose rows are those of ``matrix``."""
    stacked = matrix.reshape(prod(shape[:-2]), -1, shape[-1]) if matrix.numel() else matrix.new_zeros(1, 0, shape[-1])
    return torch.stack([column_scales(one) for one in stacked])


def _of_rows(scales: Tensor, shape: Sequence[int], first: int, count: int) -> Tensor:
    """The column scales of ``count`` rows from ``first`` on, (count, C), or (1, C) if they are the same for all."""
    if len(scales) == 1:
        return scales.float()
    return scales[torch.arange(first, first + count, device=scales.device) // shape[-2]].float()


def _negative_zeros(matrix: Tensor) -> int:
    return sum(int(((part == 0) & (_bits(part) != 0)).sum()) for part in chunks(matrix))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def chunks(matrix: Tensor) -> Iterator[Tensor]:
    """``matrix`` by rows, a few million weights at a time."""
    step = max(1, _CHUNK // max(matrix.shape[1], 1))
    for low in range(0, len(matrix), step):
        yield matrix[low : low + step]


def _to_bits(kept: Tensor) -> Tensor:
    """(R, C) bool to (R, ceil(C / 8)) uint8, the lowest bit first."""
    rows, columns = kept.shape
    kept = torch.nn.functional.pad(kept, (0, -columns % 8)).view(rows, -1, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=kept.device)
    return (kept * places).sum(dim=2, dtype=torch.uint8)


def _from_bits(mask: Tensor, columns: int) -> Tensor:
    """(R, ceil(C / 8)) uint8 to (R, C) bool."""
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(2) & places).ne(0).flatten(1)[:, :columns]
