"""Input statistics against sums in float64: padding, batching, sharing, dead inputs, near-singular moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecoflap.errors import CalibrationError, NonFiniteLoss
from ecoflap.statistics.gather import STATISTICS
from ecoflap.statistics.inputs import InputGram, InputNorm, exact_products

KINDS = pytest.mark.parametrize("kind", [InputNorm, InputGram])


def values(statistic: InputNorm | InputGram) -> Tensor:
    return statistic.norm if isinstance(statistic, InputNorm) else statistic.hessian


def test_norm_is_the_columns_l2_norm() -> None:
    x = torch.randn(3, 5, 7)
    statistic = InputNorm(7)
    statistic.update(x)
    assert statistic.tokens == 15
    torch.testing.assert_close(statistic.norm, torch.linalg.vector_norm(x.double(), dim=(0, 1)).float())


def test_hessian_is_twice_the_mean_outer_product() -> None:
    x = torch.randn(3, 5, 7)
    statistic = InputGram(7)
    statistic.update(x)
    expected = 2 * sum(torch.outer(row, row) for row in x.reshape(-1, 7).double()) / 15
    torch.testing.assert_close(statistic.hessian, expected.float())
    torch.testing.assert_close(statistic.norm, torch.linalg.vector_norm(x.double(), dim=(0, 1)).float())


@KINDS
@pytest.mark.parametrize("flat", [False, True])
def test_padding_changes_nothing(kind: type[InputNorm] | type[InputGram], flat: bool) -> None:
    x = torch.randn(2, 6, 5)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    padded, plain = kind(5), kind(5)
    x[~keep] = float("nan")  # what padding holds must not matter at all
    padded.update(x.reshape(12, 5) if flat else x, keep.reshape(-1) if flat else keep)
    plain.update(x[keep])
    assert padded.tokens == plain.tokens == 9
    assert torch.equal(values(padded), values(plain))


@KINDS
def test_batching_changes_nothing(kind: type[InputNorm] | type[InputGram]) -> None:
    x = torch.randn(24, 10, 16) * torch.logspace(-2, 2, 16)
    results = []
    for size in (1, 5, 24):
        statistic = kind(16)
        for batch in x.split(size):
            statistic.update(batch)
        results.append(values(statistic))
        assert statistic.tokens == 240
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-3)


@KINDS
def test_half_precision_inputs_are_summed_in_fp32(kind: type[InputNorm] | type[InputGram]) -> None:
    x = torch.full((4096, 2), 200.0, dtype=torch.float16)  # the squares alone overflow fp16
    statistic = kind(2)
    statistic.update(x)
    assert values(statistic).dtype == torch.float32
    torch.testing.assert_close(statistic.norm, torch.full((2,), 200.0 * 64))


@KINDS
def test_clone_goes_its_own_way(kind: type[InputNorm] | type[InputGram]) -> None:
    statistic = kind(3)
    statistic.update(torch.ones(2, 3))
    twin = statistic.clone()
    twin.update(torch.ones(2, 3))
    assert (statistic.tokens, twin.tokens) == (2, 4)
    assert type(twin) is kind
    torch.testing.assert_close(statistic.norm, torch.full((3,), 2.0).sqrt())
    torch.testing.assert_close(twin.norm, torch.full((3,), 2.0))


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_non_finite_inputs_are_refused(kind: type[InputNorm] | type[InputGram], bad: float) -> None:
    x = torch.ones(2, 3)
    x[1, 2] = bad
    with pytest.raises(NonFiniteLoss, match="input"):
        kind(3).update(x)


@KINDS
def test_wrong_shapes_are_refused(kind: type[InputNorm] | type[InputGram]) -> None:
    with pytest.raises(ValueError, match="4 columns, the statistic 3"):
        kind(3).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="5 entries for 2 tokens"):
        kind(3).update(torch.ones(2, 3), torch.ones(5, dtype=torch.bool))


@KINDS
def test_only_padding_counts_no_token(kind: type[InputNorm] | type[InputGram]) -> None:
    statistic = kind(3)
    statistic.update(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    assert statistic.tokens == 0
    assert not values(statistic).any()


def test_kinds_by_name() -> None:
    assert isinstance(STATISTICS["norm"](4), InputNorm)
    assert isinstance(STATISTICS["gram"](4), InputGram)


@pytest.mark.parametrize("columns", [1, 7, 300, 1100])  # above 512 the inverse is taken by halves
def test_factor_of_the_inverse(columns: int) -> None:
    x = torch.randn(2 * columns + 3, columns) * torch.logspace(-1, 1, columns)
    statistic = InputGram(columns)
    statistic.update(x)
    factor = statistic.inverse_factor(0.01)
    h = statistic.hessian.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(columns)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_factor_is_computed_once_until_the_inputs_change() -> None:
    statistic = InputGram(8)
    statistic.update(torch.randn(20, 8))
    first = statistic.inverse_factor(0.01)
    assert statistic.inverse_factor(0.01) is first
    assert statistic.clone().inverse_factor(0.01) is first
    assert not torch.equal(statistic.inverse_factor(0.1), first)
    statistic.update(torch.randn(20, 8))
    assert not torch.allclose(statistic.inverse_factor(0.01), first)


def test_dead_inputs_are_decoupled() -> None:
    x = torch.randn(50, 6)
    x[:, [1, 4]] = 0
    statistic = InputGram(6)
    statistic.update(x)
    assert statistic.dead.tolist() == [False, True, False, False, True, False]
    factor = statistic.inverse_factor(0.01)
    live = [0, 2, 3, 5]
    h = statistic.hessian.double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(6)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[live][:, live]), upper=True)
    torch.testing.assert_close(factor[live][:, live].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(factor[[1, 4]], torch.eye(6)[[1, 4]])
    assert torch.equal(factor[:, [1, 4]], torch.eye(6)[:, [1, 4]])


def test_all_inputs_dead() -> None:
    statistic = InputGram(3)
    statistic.update(torch.zeros(5, 3))
    assert torch.equal(statistic.inverse_factor(0.01), torch.eye(3))


def test_singular_moments_are_damped_until_they_factorise() -> None:
    statistic = InputGram(64)
    statistic.update(torch.randn(4, 1) * torch.ones(4, 64) * 1e3)  # rank 1
    factor = statistic.inverse_factor(1e-9)
    assert torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all()


def test_hopeless_moments_are_refused() -> None:
    statistic = InputGram(2)
    statistic.update(torch.ones(3, 2))
    statistic._sum = torch.tensor([[1.0, 50.0], [50.0, 1.0]])  # no second moments: not positive definite by far
    with pytest.raises(CalibrationError, match="more calibration samples or a larger damping"):
        statistic.inverse_factor(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_of_every_type_against_fp64(dtype: torch.dtype) -> None:
    """More tokens than are taken at once."""
    x = (torch.randn(3, 700, 96) * torch.rand(96)).to(dtype)
    keep = torch.rand(3, 700) > 0.3
    gram, norm = InputGram(96), InputNorm(96)
    gram.update(x, keep)
    norm.update(x, keep)
    real = x[keep].double()
    torch.testing.assert_close(gram.hessian.double(), 2 / len(real) * real.T @ real, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.norm.double(), real.square().sum(0).sqrt(), rtol=1e-6, atol=0.0)


def test_the_precision_of_products_is_as_before_after_an_error() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    with exact_products(torch.ones(1).bfloat16()):
        assert backend.fp32_precision == "bf16"
    assert backend.fp32_precision == before
    inside = exact_products(torch.ones(1).bfloat16())
    inside.__enter__()
    assert not inside.__exit__(ValueError, ValueError("a product failed"), None)
    assert backend.fp32_precision == before
    with exact_products(torch.ones(1)):
        assert backend.fp32_precision == before
