"""Wanda against the formula in float64, one weight at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Pattern, Unstructured
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.pruning.criteria import zero_out
from ecoflap.pruning.wanda import Wanda
from ecoflap.statistics.inputs import InputGram, InputNorm, all_finite


def case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, InputNorm]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(31, columns, generator=generator) * torch.rand(columns, generator=generator) * 5
    statistic = InputNorm(columns)
    statistic.update(x)
    return torch.randn(rows, columns, generator=generator), x, statistic


def slow_scores(weight: Tensor, x: Tensor) -> list[list[float]]:
    norms = [sum(float(v) ** 2 for v in column) ** 0.5 for column in x.double().T]
    return [[abs(float(w)) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.double()]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
def test_lowest_scores_of_each_row_go(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    weight, x, statistic = case(rows, columns, seed)
    zeros = data.draw(st.integers(0, rows * columns))
    pruned, mask = Wanda()(weight, statistic, zeros, Unstructured())
    assert int((~mask).sum()) == zeros
    assert torch.equal(pruned, weight * mask)
    counts = (~mask).sum(dim=1).tolist()
    assert max(counts) - min(counts) <= 1
    scores = slow_scores(weight, x)
    for row, kept, count in zip(scores, mask.tolist(), counts, strict=True):
        lowest = sorted(range(columns), key=lambda j, row=row: row[j])[:count]
        assert sorted(lowest) == [j for j in range(columns) if not kept[j]]
    following = [sorted(row)[zeros // rows] for row in scores if zeros // rows < columns]
    extra = [following[r] for r in range(rows) if counts[r] > zeros // rows]
    others = [following[r] for r in range(rows) if counts[r] == zeros // rows and following]
    assert not extra or not others or max(extra) <= min(others)


def test_over_the_matrix_and_in_groups() -> None:
    weight, x, statistic = case(6, 16)
    scores = torch.tensor(slow_scores(weight, x))
    over_all = Wanda()(weight, statistic, 41, Unstructured("matrix")).mask
    assert float(scores[~over_all].max()) < float(scores[over_all].min())
    grouped = Wanda()(weight, statistic, 48, NofM(2, 4)).mask.reshape(-1, 4)
    for group_scores, kept in zip(scores.reshape(-1, 4), grouped, strict=True):
        assert int(kept.sum()) == 2
        assert float(group_scores[~kept].max()) < float(group_scores[kept].min())


def test_hand_made() -> None:
    statistic = InputNorm(3)
    statistic.update(torch.tensor([[3.0, 0.1, 1.0], [4.0, 0.0, 0.0]]))  # norms 5, 0.1, 1
    weight = torch.tensor([[1.0, 20.0, 3.0]])
    assert Wanda()(weight, statistic, 1, Unstructured()).weight.tolist() == [[1.0, 0.0, 3.0]]
    assert Wanda()(weight, statistic, 2, Unstructured()).weight.tolist() == [[1.0, 0.0, 0.0]]


def test_the_gram_serves_as_well() -> None:
    weight, x, statistic = case(5, 12)
    gram = InputGram(12)
    gram.update(x)
    assert torch.equal(
        Wanda()(weight, gram, 31, Unstructured()).mask, Wanda()(weight, statistic, 31, Unstructured()).mask
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [0, 77, 8 * 33])
def test_low_precision_keeps_the_bits(dtype: torch.dtype, zeros: int) -> None:
    weight, _, statistic = case(8, 33)
    weight = weight.to(dtype)
    pruned, mask = Wanda()(weight, statistic, zeros, Unstructured())
    assert pruned.dtype == dtype
    assert int((pruned == 0).sum()) == int((~mask).sum()) == zeros
    assert torch.equal(pruned[mask].view(torch.int16), weight[mask].view(torch.int16))


def test_padding_does_not_change_masks() -> None:
    weight, x, statistic = case(8, 33)
    padded = InputNorm(33)
    noisy = torch.cat([x, torch.full((9, 33), 1e4)])
    padded.update(noisy, torch.arange(40) < 31)
    for pattern in (Unstructured("row"), Unstructured("matrix")):
        assert torch.equal(Wanda()(weight, padded, 100, pattern).mask, Wanda()(weight, statistic, 100, pattern).mask)


def test_a_transposed_view() -> None:
    weight, _, statistic = case(8, 33)
    view = weight.T.contiguous().T
    assert torch.equal(
        Wanda()(view, statistic, 100, Unstructured()).weight, Wanda()(weight, statistic, 100, Unstructured()).weight
    )


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (None, "needs statistics"),
        (InputNorm(5), "of 5 inputs but the weight has 4"),
        (InputNorm(4), "no calibration token"),
    ],
)
def test_missing_statistics(statistic: InputNorm | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Wanda()(torch.randn(3, 4), statistic, 2, Unstructured())


@pytest.mark.parametrize("pattern", [NofM(2, 4)])
def test_patterns_that_do_not_divide(pattern: Pattern) -> None:
    weight, _, statistic = case(3, 10)
    with pytest.raises(InvalidOption, match="10 columns"):
        Wanda()(weight, statistic, 15, pattern)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_are_plus_zero_and_the_rest_is_kept_to_the_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 10).to(dtype).t()
    mask = torch.rand(10, 6) > 0.5
    pruned = zero_out(weight, mask).weight
    assert torch.equal(pruned[mask], weight[mask])
    assert not torch.signbit(pruned[~mask]).any()
    assert not pruned[~mask].any()


def test_finite_means_neither_nan_nor_infinite() -> None:
    fine = torch.randn(3, 4).bfloat16()
    assert all_finite(fine)
    assert all_finite(fine[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        one = fine.clone()
        one[2, 1] = bad
        assert not all_finite(one)
