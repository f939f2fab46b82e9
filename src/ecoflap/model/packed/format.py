"""Defines the bitmask layout of one sparse weight: its non-zeros in order, and a mask of one bit for each weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ecoflap.errors import InvalidOption

PARTS = ("compressed", "bitmask", "row_offsets", "shape", "scales")  # what is stored of a weight; scales for int8 alone
VALUES = ("auto", "int8")
GROUP_STEP = 64  # columns; kernels read as many at a time, so a group never ends inside a step
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # weights that are worked on at a time: bounds the memory of temporaries
_FEW = 0.01  # share of weights that are -0 up to which each is stored, so that unpacking gives every bit back
_WORTH = 0.95  # of the dense bytes: a weight that would not get smaller than that stays dense


@dataclass(frozen=True)
class PackedWeight:
    """One weight of shape (..., C), seen as R rows of C columns.

    Attributes:
        compressed: (nnz,) the values that are not zero, row by row, columns ascending; int8 with ``scales``.
        bitmask: (R, ceil(C / 8)) uint8; bit j of byte b is column 8 b + j.
        row_offsets: (R,) int64; where each row begins in ``compressed``.
        shape: the dense weight's.
        scales: (R, groups) float32, by which the int8 values of a row are multiplied, group of columns by group.
        group_size: columns that share a scale; 0 for the whole row.
    """

    compressed: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    shape: tuple[int, ...]
    scales: Tensor | None = None
    group_size: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the parts take, in memory and in a file alike."""
        tensors = [self.compressed, self.bitmask, self.row_offsets] + ([] if self.scales is None else [self.scales])
        return sum(tensor.nbytes for tensor in tensors) + 8 * len(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The parts by their names in a file."""
        found = {
            "compressed": self.compressed,
            "bitmask": self.bitmask,
            "row_offsets": self.row_offsets,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
        }
        return found if self.scales is None else {**found, "scales": self.scales}


def pack_weight(weight: Tensor, values: str = "auto", group_size: int = 0) -> PackedWeight:
    """Pack ``weight`` of any floating dtype and at least one dimension, where it lies.

    Args:
        values: "auto" keeps the non-zeros to the bit (a -0 too, unless more than 1 % of the weights are -0: then it
            is one of the zeros). "int8" rounds them to 8 bits, symmetrically: w ≈ q s with s = max |w| / 127 of the
            group.
        group_size: columns that share a scale of int8 values, a multiple of 64; 0: the whole row.

    Raises:
        InvalidOption: unknown ``values``, or a group size that no kernel reads.
    """
    if values not in VALUES:
        raise InvalidOption(f"values '{values}' is not one of {', '.join(VALUES)}")
    if group_size < 0 or group_size % GROUP_STEP:
        raise InvalidOption(f"group size {group_size}: give a multiple of {GROUP_STEP} columns")
    matrix = weight.detach().reshape(prod(weight.shape[:-1]), weight.shape[-1])
    scales = None
    if values == "int8":
        matrix, scales = _quantised(matrix, group_size or max(matrix.shape[1], 1))
    exact = values == "auto" and _negative_zeros(matrix) <= _FEW * matrix.numel()
    masks, stored, counts = [], [], []
    for rows in chunks(matrix):
        kept = _bits(rows) != 0 if exact else rows != 0
        masks.append(_to_bits(kept))
        stored.append(rows[kept])
        counts.append(kept.sum(dim=1, dtype=torch.int64))
    count = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=weight.device)
    offsets = count.cumsum(0) - count
    empty = (matrix.new_zeros(0), torch.zeros(0, -(-matrix.shape[1] // 8), dtype=torch.uint8, device=weight.device))
    return PackedWeight(
        torch.cat(stored) if stored else empty[0],
        torch.cat(masks) if masks else empty[1],
        offsets,
        tuple(weight.shape),
        scales,
        group_size if scales is not None else 0,
    )


def unpack_weight(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight, where the parts lie; in ``dtype``, by default that of the values (float32 for int8)."""
    dtype = dtype or (torch.float32 if packed.scales is not None else packed.compressed.dtype)
    rows, columns = len(packed.bitmask), packed.shape[-1]
    dense = torch.zeros(rows, columns, dtype=dtype, device=packed.bitmask.device)
    unpack_rows(packed, 0, dense)
    return dense.reshape(packed.shape)


def unpack_rows(packed: PackedWeight, first: int, dense: Tensor) -> None:
    """Write rows ``first`` and following into ``dense`` (rows, C), which holds zeros."""
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
            stored = stored.float() * scales[:, :columns][kept]
        _bits(part)[kept] = _bits(stored.to(dense.dtype))


def packed_bytes(weight: Tensor, values: str = "auto", group_size: int = 0) -> int:
    """What :func:`pack_weight` would make of ``weight``, without making it (int8: at most)."""
    columns = weight.shape[-1]
    rows = prod(weight.shape[:-1])
    kept = sum(int(part.count_nonzero()) for part in chunks(weight.detach().reshape(rows, columns)))
    size = 1 if values == "int8" else weight.element_size()
    groups = -(-columns // group_size) if group_size else 1
    scales = 4 * rows * groups if values == "int8" else 0
    return kept * size + rows * -(-columns // 8) + 8 * rows + 8 * weight.dim() + scales


def worth_packing(weight: Tensor, values: str = "auto", group_size: int = 0) -> bool:
    """Whether packing makes ``weight`` smaller by more than a few per cent."""
    if weight.dim() < 2 or not weight.is_floating_point():
        return False
    return packed_bytes(weight, values, group_size) < _WORTH * weight.nbytes


def _quantised(matrix: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(R, C) int8 and (R, groups) float32."""
    rows, columns = matrix.shape
    groups = max(1, -(-columns // group_size))
    scales = torch.ones(rows, groups, device=matrix.device)
    rounded = torch.empty(rows, columns, dtype=torch.int8, device=matrix.device)
    for group in range(groups):
        part = matrix[:, group * group_size : (group + 1) * group_size].float()
        largest = part.abs().amax(dim=1) if part.shape[1] else scales[:, group] * 0
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a quotient that underflows
        scales[:, group] = scale
        rounded[:, group * group_size : (group + 1) * group_size] = (
            (part / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        )
    return rounded, scales


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
