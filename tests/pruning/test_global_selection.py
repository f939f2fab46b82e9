"""The exact lowest scores of many tensors against sorting all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap.errors import NonFiniteLoss
from ecoflap.pruning.whole_model import keys_of, lowest

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 2.0, 1e-45, 3e38, 0.5]),
    st.floats(0, 2.0**127, width=32),
)
POOLS = st.lists(st.lists(NUMBERS, min_size=1, max_size=12), min_size=1, max_size=5)


def chosen(scores: list[Tensor], weights: list[Tensor], count: int) -> list[list[bool]]:
    keys = [keys_of(score, weight) for score, weight in zip(scores, weights, strict=True)]
    cut = lowest(lambda: iter(keys), count)
    masks = [cut.take(key) for key in keys]
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    return [mask.flatten().tolist() for mask in masks]


def by_sorting(scores: list[Tensor], weights: list[Tensor], count: int) -> list[list[bool]]:
    """Zero weights first, then by score, then by the order of tensors, then by index."""
    every = [
        (float(w) != 0, float(s) if float(w) else 0.0, i, j)
        for i, (score, weight) in enumerate(zip(scores, weights, strict=True))
        for j, (s, w) in enumerate(zip(score.flatten(), weight.flatten(), strict=True))
    ]
    cut = {(i, j) for _, _, i, j in sorted(every)[:count]}
    return [[(i, j) in cut for j in range(score.numel())] for i, score in enumerate(scores)]


@settings(deadline=None, max_examples=200)
@given(POOLS, st.floats(0, 1), st.randoms(use_true_random=False))
def test_against_sorting(values: list[list[float]], share: float, choose: object) -> None:
    scores = [torch.tensor(row, dtype=torch.float32) for row in values]
    weights = [torch.tensor([float(choose.random() > 0.2) for _ in row]) for row in values]  # type: ignore[attr-defined]
    count = round(share * sum(len(row) for row in values))
    assert chosen(scores, weights, count) == by_sorting(scores, weights, count)


@pytest.mark.parametrize("count", [0, 1, 2999, 3000, 12345, 24999, 25000])
def test_large_tensors_with_many_ties(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = [torch.rand(shape, generator=generator).mul(50).round() for shape in ((100, 100), (50, 300))]
    weights = [torch.ones_like(score) for score in scores]
    found = chosen(scores, weights, count)
    assert sum(map(sum, found)) == count
    assert found == by_sorting(scores, weights, count)


@pytest.mark.parametrize("count", [0, 1, 777, 20000])
def test_neighbouring_floats(count: int) -> None:
    """All bits count: numbers that differ in the last one are told apart."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0x3F800000, 0x3F800000 + 70000, (200, 100), generator=generator, dtype=torch.int32)
    scores, weights = [bits.view(torch.float32)], [torch.ones(200, 100)]
    assert chosen(scores, weights, count) == by_sorting(scores, weights, count)


def test_a_transposed_view_keeps_its_shape() -> None:
    score = torch.tensor([[3.0, 1.0, 2.0], [6.0, 5.0, 4.0]]).t()
    assert chosen([score], [torch.ones(3, 2)], 2) == [[False, False, True, False, True, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(value: float) -> None:
    with pytest.raises(NonFiniteLoss):
        keys_of(torch.tensor([1.0, value]), torch.ones(2))
