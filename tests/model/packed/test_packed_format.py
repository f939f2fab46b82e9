"""One weight, packed and unpacked: against numpy's packbits, to the bit, and whatever is damaged is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.errors import CheckpointError, EcoflapError, InvalidOption
from ecoflap.model.packed.checks import check, from_tensors
from ecoflap.model.packed.columns import column_scales
from ecoflap.model.packed.format import pack_weight, packed_bytes, unpack_weight, worth_packing

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def sparse(rows, columns, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    weight[weight.to(dtype).float() == 0] = 0  # no -0 by rounding: of a small matrix one may be more than 1 %
    return weight.to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), sparsity=st.floats(0, 1), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_bit_comes_back_and_the_mask_is_numpys(rows, columns, sparsity, dtype, seed):
    weight = sparse(rows, columns, sparsity, dtype, seed)
    packed = pack_weight(weight)
    check(packed, "w")
    assert torch.equal(bits(unpack_weight(packed)), bits(weight))
    if dtype is torch.float32:
        dense = weight.numpy()
        assert np.array_equal(packed.bitmask.numpy(), np.packbits(dense != 0, axis=1, bitorder="little"))
        assert np.array_equal(packed.compressed.numpy(), dense[dense != 0])
        assert packed.row_offsets.tolist() == [int((dense[:row] != 0).sum()) for row in range(rows)]
        assert packed.nbytes == packed_bytes(weight)


def test_special_values_and_a_few_negative_zeros_come_back():
    weight = sparse(40, 50, 0.5)
    weight[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    assert torch.equal(bits(unpack_weight(pack_weight(weight))), bits(weight))


def test_a_mask_that_was_multiplied_leaves_no_stored_zeros():
    weight = sparse(40, 50, 0.5) * -1.0  # its zeros are -0
    packed = pack_weight(weight)
    assert len(packed.compressed) == int(weight.count_nonzero())
    assert torch.equal(unpack_weight(packed), weight)  # -0 == 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (5,), (2, 3, 9), (1, 1)])
def test_odd_shapes(shape):
    weight = torch.randn(shape)
    packed = pack_weight(weight)
    check(packed, "w")
    assert packed.shape == shape
    assert torch.equal(unpack_weight(packed), weight)


def test_a_part_that_is_not_contiguous():
    weight = sparse(30, 20, 0.5).t()
    assert torch.equal(unpack_weight(pack_weight(weight)), weight)


@given(rows=st.integers(1, 40), columns=st.integers(1, 30), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_factors_of_columns_by_their_formula(rows, columns, sparsity, seed):
    weight = sparse(rows, columns, sparsity, seed=seed)
    weight *= torch.logspace(-3, 3, columns)[torch.randperm(columns)]
    even = weight.double().numpy()
    divisors = np.ones(columns)
    for _ in range(3):
        even = np.array([row / np.sqrt(np.mean(row[row != 0] ** 2)) if row.any() else row for row in even])
        roots = np.array([np.sqrt(np.mean(column[column != 0] ** 2)) if column.any() else 1 for column in even.T])
        even, divisors = even / roots, divisors * roots
    known = sorted(divisors[(weight != 0).any(dim=0).numpy()])
    found = column_scales(weight)
    assert found.dtype == torch.bfloat16
    for factor, divisor, column in zip(found.tolist(), divisors, weight.T, strict=True):
        exact = 0.75 * np.log2(divisor / known[(len(known) - 1) // 2]) if column.any() else 0
        assert np.log2(factor) == round(np.log2(factor))
        assert abs(np.log2(factor) - np.clip(exact, -8, 8)) <= 0.501


def test_a_column_of_large_weights_does_not_spoil_the_others():
    weight = sparse(64, 256, 0.5)
    alone = (unpack_weight(pack_weight(weight, "int4")) - weight)[weight != 0].square().mean().sqrt()
    weight[:, 7] = 150 * torch.randn(64)
    off = unpack_weight(pack_weight(weight, "int4")) - weight
    off[:, 7] = 0
    assert off[weight != 0].square().mean().sqrt() < 2 * alone  # without factors it is fifty times as much
    assert off[:, 128:][weight[:, 128:] != 0].square().mean().sqrt() < 1.2 * alone


def test_stacked_matrices_have_factors_of_their_own():
    stack = torch.stack([sparse(6, 70, 0.5, seed=seed) * torch.logspace(-2, 2, 70) ** seed for seed in range(3)])
    packed = pack_weight(stack, "int4")
    check(packed, "w")
    assert torch.equal(packed.column_scales, torch.stack([column_scales(one) for one in stack]))
    alone = [unpack_weight(pack_weight(one, "int4")) for one in stack]
    torch.testing.assert_close(unpack_weight(packed), torch.stack(alone), rtol=1e-6, atol=0)  # of the scales' sums


@pytest.mark.parametrize("group_size", [0, 64, 128])
def test_int8_is_within_half_a_step_of_its_groups_largest(group_size):
    weight = sparse(8, 300, 0.6)
    packed = pack_weight(weight, "int8", group_size)
    check(packed, "w")
    factors = packed.column_scales.float()
    back, weight = unpack_weight(packed) / factors, weight / factors
    size = group_size or 300
    for first in range(0, 300, size):
        part = weight[:, first : first + size]
        step = part.abs().amax(dim=1, keepdim=True) / 127
        assert ((back[:, first : first + size] - part).abs() <= step * 0.5001).all()
    assert packed.nbytes <= packed_bytes(weight, "int8", group_size)
    assert packed.compressed.dtype == torch.int8
    assert (back[weight == 0] == 0).all()


def by_hand(packed):
    """The dense weight of int4 codes, one weight after the other."""
    rows, columns = packed.shape
    mask = np.unpackbits(packed.bitmask.numpy(), axis=1, bitorder="little")[:, :columns]
    dense, stored = np.zeros((rows, columns), np.float32), packed.compressed.numpy()
    for row in range(rows):
        half = 2 * int(packed.row_offsets[row])
        for column in range(columns):
            if column % 64 == 0:
                half += half % 2
            if mask[row, column]:
                code = int(stored[half // 2]) >> half % 2 * 4 & 15
                scale = packed.scales[row, column // packed.group_size if packed.group_size else 0].numpy()
                factor = np.float32(float(packed.column_scales[0, column]))
                dense[row, column] = np.float32(2 * code - 15) * scale * factor
                half += 1
    return torch.from_numpy(dense)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), sparsity=st.floats(0, 1),
    group_size=st.sampled_from([0, 64, 128]), dtype=st.sampled_from(DTYPES[:4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_int4_is_read_one_by_one_and_no_worse_than_steps_to_the_largest(
    rows, columns, sparsity, group_size, dtype, seed
):
    weight = sparse(rows, columns, sparsity, dtype, seed)
    packed = pack_weight(weight, "int4", group_size)
    check(packed, "w")
    back = unpack_weight(packed)
    assert torch.equal(back, by_hand(packed))
    assert torch.equal(back != 0, weight != 0)
    assert packed.nbytes <= packed_bytes(weight, "int4", group_size)
    factors = packed.column_scales.float()
    weight, back = weight.float() / factors, back / factors
    size = group_size or columns
    for first in range(0, columns, size):
        part = weight[:, first : first + size]
        steps = part.abs().amax(dim=1, keepdim=True) / 15
        odd = (2 * ((part / steps.clamp(min=1e-30) - 1) / 2).round() + 1).clamp(-15, 15)
        plain = torch.where(part == 0, part, odd * steps)
        found = (back[:, first : first + size] - part).square().sum(dim=1)
        assert (found <= (plain - part).square().sum(dim=1) * 1.001 + 1e-12).all()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_what_is_not_finite_is_not_rounded(values):
    with pytest.raises(InvalidOption, match="finite"):
        pack_weight(torch.tensor([[1.0, float("inf")]]), values)


def test_the_default_group_of_int4_takes_a_quarter_of_a_bit_a_weight():
    packed = pack_weight(sparse(64, 1024, 0.7), "int4")
    assert packed.scales.shape == (64, 8)
    kept = int((unpack_weight(packed) != 0).sum())
    halves = 2 * len(packed.compressed) - kept  # of blocks with an odd number of codes
    assert 0 <= halves <= 64 * 16


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rows_without_weights_and_tiny_ones(values):
    weight = torch.zeros(3, 64)
    weight[1, 5] = 1e-44  # over 127 it underflows
    packed = pack_weight(weight, values)
    check(packed, "w")
    assert unpack_weight(packed).abs().max() < 1e-30


def test_what_is_worth_packing():
    assert worth_packing(sparse(64, 64, 0.5, torch.bfloat16))
    assert not worth_packing(sparse(64, 64, 0.02, torch.bfloat16))
    assert worth_packing(sparse(64, 64, 0.0, torch.bfloat16), "int8")
    assert not worth_packing(torch.zeros(8))
    assert not worth_packing(torch.zeros(64, 64, dtype=torch.int64))


@pytest.mark.parametrize(("values", "group_size"), [("int3", 0), ("int8", 63), ("int8", -64), ("int4", 32)])
def test_wrong_options(values, group_size):
    with pytest.raises(InvalidOption):
        pack_weight(torch.ones(2, 2), values, group_size)


def broken(packed, name):
    flipped = packed.bitmask.clone()
    flipped[0, 0] ^= 1
    behind = packed.bitmask.clone()
    behind[0, -1] |= 128
    shifted = packed.row_offsets.clone()
    shifted[1] += 1
    changes = {
        "flipped bit": {"bitmask": flipped},
        "bit behind the last column": {"bitmask": behind},
        "offset": {"row_offsets": shifted},
        "negative offsets": {"row_offsets": -packed.row_offsets},
        "short values": {"compressed": packed.compressed[:-1]},
        "long values": {"compressed": torch.cat([packed.compressed, packed.compressed])},
        "matrix of values": {"compressed": packed.compressed[None]},
        "shape": {"shape": (packed.shape[0] + 1, packed.shape[1])},
        "columns": {"shape": (packed.shape[0], packed.shape[1] + 8)},
        "negative shape": {"shape": (-packed.shape[0], -packed.shape[1])},
        "huge shape": {"shape": (1 << 62, 1 << 62)},
        "mask's dtype": {"bitmask": packed.bitmask.to(torch.int32)},
        "offsets' dtype": {"row_offsets": packed.row_offsets.to(torch.int32)},
        "offsets as floats": {"row_offsets": packed.row_offsets.float()},
        "int8 without scales": {"compressed": packed.compressed.to(torch.int8)},
        "scales of floats": {"scales": torch.ones(packed.shape[0], 1)},
    }
    return dataclasses.replace(packed, **changes[name])


NAMES = [
    "flipped bit", "bit behind the last column", "offset", "negative offsets", "short values", "long values",
    "matrix of values", "shape", "columns", "negative shape", "huge shape", "mask's dtype", "offsets' dtype",
    "offsets as floats", "int8 without scales", "scales of floats",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_told_in_one_line(name):
    with pytest.raises(CheckpointError, match=r"'a\.b\.weight' is damaged") as caught:
        check(broken(pack_weight(sparse(6, 21, 0.5)), name), "a.b.weight")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda scales: scales * float("inf"),
    lambda scales: scales[:, :1],
    lambda scales: scales[:-1],
    lambda scales: scales.half(),
    lambda scales: scales[0],
])  # fmt: skip
def test_damaged_scales(change):
    packed = pack_weight(sparse(6, 200, 0.5), "int8", 64)
    with pytest.raises(CheckpointError, match="scales"):
        check(dataclasses.replace(packed, scales=change(packed.scales)), "w")


@pytest.mark.parametrize("change", [
    lambda factors: factors * float("nan"),
    lambda factors: factors * 0,
    lambda factors: -factors,
    lambda factors: factors * 1.5,
    lambda factors: factors * 2**20,
    lambda factors: factors[:, :-1],
    lambda factors: factors[0],
    lambda factors: factors.to(torch.int16),
])  # fmt: skip
def test_damaged_factors_of_columns(change):
    packed = pack_weight(sparse(6, 200, 0.5), "int4")
    with pytest.raises(CheckpointError, match="column_scales"):
        check(dataclasses.replace(packed, column_scales=change(packed.column_scales)), "w")
    plain = dataclasses.replace(pack_weight(sparse(6, 200, 0.5)), column_scales=packed.column_scales)
    with pytest.raises(CheckpointError, match="no scales"):
        check(plain, "w")


@given(data=st.data())
def test_whatever_is_in_a_file_is_whole_or_refused(data):
    """Random bytes, dtypes, shapes in any part: a weight of its shape comes out, or one line."""
    values, group_size = data.draw(st.sampled_from([("auto", 0), ("int8", 64), ("int4", 64)]))
    tensors = pack_weight(sparse(5, 70, 0.5), values, group_size).tensors()
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2)):
        whole = tensors[name]
        kind = data.draw(st.sampled_from(["bytes", "dtype", "cut", "gone", "value"]))
        if kind == "gone":
            tensors.pop(name, None)
            break
        raw = bytearray(whole.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if kind == "cut":
            whole = whole.flatten()[: data.draw(st.integers(0, whole.numel()))]
        elif kind == "dtype":
            whole = whole.to(data.draw(st.sampled_from([torch.int8, torch.uint8, torch.int64, torch.float16])))
        elif kind == "value" and raw:
            whole = whole.clone()
            whole.view(-1)[data.draw(st.integers(0, whole.numel() - 1))] = data.draw(st.sampled_from([0, 1, 127]))
        elif raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
            whole = torch.frombuffer(raw, dtype=whole.dtype).reshape(whole.shape).clone()
        tensors[name] = whole
    line = ""
    try:
        packed = from_tensors(tensors, "w", group_size)
        assert unpack_weight(packed).shape == packed.shape
    except EcoflapError as error:  # nothing else may come
        line = str(error)
    assert "\n" not in line
