"""The product with packed weights against the dense one in float64, by every instruction set that is here."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.model.packed import kernels, ops
from ecoflap.model.packed.format import pack_weight, unpack_weight

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# Half a unit in the last place of a result, and the smallest that such a result can be off when it is subnormal.
ROUNDING = {torch.bfloat16: (2**-8, 1e-38), torch.float16: (2**-10, 6e-8), torch.float32: (2**-23, 1e-37)}
VALUES = [("auto", 0), *((values, size) for values in ("int8", "int4") for size in (0, 64, 128))]
CHOICES = [name for name in ("avx512", "avx2", "neon", "scalar") if kernels.choose(name)] or ["torch"]


@pytest.fixture(params=CHOICES)
def isa(request):
    with chosen(request.param):
        yield request.param


class chosen:
    def __init__(self, name):
        self.name, self.before = name, kernels.isa()

    def __enter__(self):
        kernels.choose(self.name)

    def __exit__(self, *_):
        kernels.choose(self.before)


def sparse(rows, columns, sparsity, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return weight.to(dtype)


def agrees(result, x, packed, bias=None, unpacked_in=None):
    """Within the bound of a sum of C products in float32 in any order, plus the result's own rounding.

    |y - y*| <= (C + 2) u Σ |w x| + ulp(y*) for u = 2^-24, and where int8 values were unpacked to 16 bits (many tokens)
    half a unit of those for each weight.
    """
    weight = unpack_weight(packed, torch.float32 if packed.scales is not None else None).double()
    exact = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    relative, smallest = ROUNDING[x.dtype]
    bound = size * (weight.shape[1] + 2) * 2**-23 + exact.abs() * relative + smallest
    if packed.column_scales is not None and x.dtype is torch.float16:  # inputs times factors that become subnormal
        bound = bound + 2**-25 * (weight.abs() / packed.column_scales.double()).sum(dim=1)
    if packed.scales is not None and unpacked_in is not None:
        bound = bound + size * ROUNDING[unpacked_in][0]
    assert result.shape == exact.shape
    assert result.dtype == x.dtype
    difference = (result.double() - exact).abs()
    assert (difference <= bound).all(), float((difference / bound).max())


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 300), sparsity=st.sampled_from([0, 0.1, 0.5, 0.7, 0.97, 1]),
    tokens=st.integers(1, 70), dtype=st.sampled_from(FLOATS), x_dtype=st.sampled_from(FLOATS),
    values=st.sampled_from(VALUES), biased=st.booleans(),
    seed=st.integers(0, 99), choice=st.sampled_from(CHOICES),
)  # fmt: skip
def test_ragged_shapes_of_every_kind(rows, columns, sparsity, tokens, dtype, x_dtype, values, biased, seed, choice):
    packed = pack_weight(sparse(rows, columns, sparsity, dtype, seed), *values)
    x = sparse(tokens, columns, 0, x_dtype, seed + 1)
    bias = sparse(1, rows, 0, x_dtype, seed + 2)[0] if biased else None
    with chosen(choice):
        agrees(ops.packed_linear(x, packed, bias), x, packed, bias, x_dtype if tokens > kernels.most_tokens() else None)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 24, 25, 64, 65, 200])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", ["auto", "int4"])
def test_larger_matrices(isa, tokens, dtype, values):
    packed = pack_weight(sparse(333, 1000, 0.6, dtype), values)
    x = sparse(tokens, 1000, 0, dtype, 1)
    agrees(ops.packed_linear(x, packed), x, packed, None, dtype if tokens > kernels.most_tokens() else None)


@pytest.mark.parametrize("values", ["auto", "int8", "int4"])
def test_empty_and_full_rows(isa, values):
    weight = sparse(30, 200, 0.5, torch.bfloat16)
    weight[::3], weight[1::3] = 0, 1.5
    weight[20:] = 0  # the last rows hold nothing: their offsets are the end
    packed = pack_weight(weight, values)
    x = sparse(1, 200, 0, torch.bfloat16, 1)
    agrees(ops.packed_linear(x, packed), x, packed)
    nothing = pack_weight(torch.zeros(4, 50))
    assert not ops.packed_linear(torch.ones(2, 50), nothing).any()


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
@pytest.mark.parametrize("values", ["auto", "int4"])
def test_unaligned_memory_that_ends_with_the_last_value(isa, shift, values):
    packed = pack_weight(sparse(9, 123, 0.5, torch.bfloat16), values)

    def moved(tensor):
        room = torch.zeros(tensor.nbytes + 64, dtype=torch.uint8)
        place = room[shift * tensor.element_size() :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    packed = dataclasses.replace(
        packed, compressed=moved(packed.compressed), bitmask=moved(packed.bitmask),
        row_offsets=moved(packed.row_offsets), scales=packed.scales if packed.scales is None else moved(packed.scales),
    )  # fmt: skip
    x = moved(sparse(3, 123, 0, torch.bfloat16, 1))
    agrees(ops.packed_linear(x, packed), x, packed)


def test_threads_change_no_bit(isa):
    if isa == "torch":
        pytest.skip("torch's own products may differ")
    packed = pack_weight(sparse(257, 700, 0.5, torch.float32))
    x = torch.randn(5, 700)
    alone = ops.packed_linear(x, packed)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.packed_linear(x, packed), alone)
    finally:
        torch.set_num_threads(before)


def test_a_tile_that_does_not_hold_the_matrix(isa, monkeypatch):
    monkeypatch.setattr(ops, "_TILE", 3000)
    packed = pack_weight(sparse(50, 90, 0.5, torch.bfloat16))
    x, bias = sparse(70, 90, 0, torch.bfloat16, 1), sparse(1, 50, 0, torch.bfloat16, 2)[0]
    agrees(ops.packed_linear(x, packed, bias), x, packed, bias)


def test_views_and_more_dimensions(isa):
    packed = pack_weight(sparse(20, 64, 0.5, torch.float32))
    x = torch.randn(64, 2, 5).transpose(0, 2)
    result = ops.packed_linear(x, packed)
    agrees(result.flatten(0, 1), x.flatten(0, 1), packed)
    assert result.shape == (5, 2, 20)
    assert ops.packed_linear(torch.randn(0, 3, 64), packed).shape == (0, 3, 20)


def test_dtypes_that_no_kernel_reads(isa):
    packed = pack_weight(sparse(20, 64, 0.5, torch.float64))
    x = torch.randn(3, 64, dtype=torch.float64)
    assert torch.allclose(ops.packed_linear(x, packed), x @ unpack_weight(packed).T)


def test_the_gradient_is_the_dense_ones(isa):
    packed = pack_weight(sparse(20, 64, 0.5, torch.float32))
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(20, requires_grad=True)
    gradients = torch.autograd.grad(ops.packed_linear(x, packed, bias).square().sum(), (x, bias))
    dense = torch.nn.functional.linear(x, unpack_weight(packed), bias).square().sum()
    for found, expected in zip(gradients, torch.autograd.grad(dense, (x, bias)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_does_not_fit_the_input_is_refused():
    if kernels.isa() == "torch":
        pytest.skip("no kernels")
    packed = pack_weight(sparse(20, 64, 0.5, torch.float32))
    with pytest.raises(RuntimeError, match="do not fit"):
        ops.packed_linear(torch.randn(1, 128), packed)


def test_compiled_and_exported():
    packed = pack_weight(sparse(20, 64, 0.5, torch.float32))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ops.packed_linear(x, packed) + 1

    x = torch.randn(3, 64)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert torch.equal(program.module()(torch.cat([x, x])), Layer()(torch.cat([x, x])))
    assert torch.equal(torch.compile(Layer(), backend="aot_eager", fullgraph=True)(x), Layer()(x))


def test_without_kernels_torch_multiplies():
    code = (
        "import torch; from ecoflap.model.packed import kernels, ops;"
        "from ecoflap.model.packed.format import pack_weight;"
        "w = torch.randn(9, 70) * (torch.rand(9, 70) > 0.5); x = torch.randn(2, 70);"
        "assert kernels.isa() == 'torch' and torch.allclose(ops.packed_linear(x, pack_weight(w)), x @ w.T, atol=1e-4)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, kernels.OFF: "1"}, check=True)


def test_the_environment_picks_the_instruction_set():
    if kernels.isa() == "torch":
        pytest.skip("no kernels")
    code = "from ecoflap.model.packed import kernels; print(kernels.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, kernels.CHOICE: "scalar"}, check=True, capture_output=True
    )
    assert done.stdout.decode().strip() == "scalar"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_no_read_goes_too_far():
    """Under the sanitisers, with memory that ends with the last value."""
    from kernels_check import SANITISERS, check

    assert check(["g++"], platform.machine(), [], SANITISERS) == ""
