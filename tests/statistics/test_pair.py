"""Statistics of one input in two models, against plain products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoflap.errors import NonFiniteLoss
from ecoflap.statistics.gather import STATISTICS
from ecoflap.statistics.inputs import InputGram, InputNorm
from ecoflap.statistics.pair import InputPair


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 9), sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_against_plain_products(columns: int, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = STATISTICS["pair"](columns)
    assert isinstance(pair, InputPair)
    pruned, dense = [], []
    for size in sizes:
        x, other = torch.randn(2, 2, size, columns, generator=generator)
        keep = torch.rand(2, size, generator=generator) < 0.7
        pair.update(x, keep, other)
        pruned.append(x[keep])
        dense.append(other[keep])
    a, b = torch.cat(pruned).double(), torch.cat(dense).double()
    assert pair.tokens == len(a)
    torch.testing.assert_close(pair.moments.double(), a.T @ a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.cross.double(), b.T @ a, rtol=1e-5, atol=1e-5)


def test_of_the_pruned_inputs_it_has_all_that_a_gram_has() -> None:
    x, dense = torch.randn(2, 30, 6)
    x[:, 2] = 0
    pair, gram = InputPair(6), InputGram(6)
    pair.update(x, None, dense)
    gram.update(x)
    for one, other in [
        (pair.norm, gram.norm),
        (pair.hessian, gram.hessian),
        (pair.dead, gram.dead),
        (pair.inverse_factor(), gram.inverse_factor()),
    ]:
        assert torch.equal(one, other)


def test_without_dense_inputs_both_are_the_same() -> None:
    pair = InputPair(4)
    pair.update(torch.randn(20, 4))
    torch.testing.assert_close(pair.cross, pair.moments)


def test_groups_add_up_and_copies_go_their_own_way() -> None:
    x, dense = torch.randn(2, 40, 5)
    whole, parts = InputPair(5), InputPair(5)
    whole.update(x, None, dense)
    for number in range(4):
        parts.begin(number)
        parts.update(x[number * 10 : number * 10 + 10], None, dense[number * 10 : number * 10 + 10])
    parts.close()
    torch.testing.assert_close(parts.cross, whole.cross)
    twin = whole.clone()
    twin.update(x)
    assert not torch.equal(twin.cross, whole.cross)


def test_refusals() -> None:
    pair = InputPair(3)
    with pytest.raises(ValueError, match=r"have shape \(4, 3\), not \(5, 3\)"):
        pair.update(torch.zeros(5, 3), None, torch.zeros(4, 3))
    bad = torch.ones(5, 3)
    bad[1, 1] = float("inf")
    with pytest.raises(NonFiniteLoss):
        pair.update(torch.ones(5, 3), None, bad)
    with pytest.raises(NonFiniteLoss):
        InputPair(3).update(bad)
    masked = InputPair(3)
    masked.update(torch.ones(5, 3), torch.arange(5) != 1, bad)
    assert masked.tokens == 4


@pytest.mark.parametrize("statistic", [InputNorm, InputGram, InputPair])
def test_weights_of_tokens_are_factors_of_their_squares(statistic: Any) -> None:
    x, dense = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    weights = torch.rand(3, 5)
    weights[0, 2] = weights[2, 4] = 0
    x[0, 2] = torch.nan  # a token of weight 0 does not enter at all
    more = {"dense": dense} if statistic is InputPair else {}
    found = statistic(7)
    found.update(x, weights, **more)
    assert found.tokens == 13
    rows, factors = x.reshape(-1, 7).nan_to_num().double(), weights.flatten().double()
    squares = torch.einsum("ti,t,tj->ij", rows, factors, rows)
    torch.testing.assert_close(found.norm.double().square(), squares.diagonal(), rtol=1e-4, atol=1e-6)
    if statistic is not InputNorm:
        torch.testing.assert_close(found.moments.double(), squares, rtol=1e-4, atol=1e-5)
    if statistic is InputPair:
        crossed = torch.einsum("ti,t,tj->ij", dense.reshape(-1, 7).double(), factors, rows)
        torch.testing.assert_close(found.cross.double(), crossed, rtol=1e-4, atol=1e-5)
