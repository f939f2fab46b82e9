"""Magnitude pruning against sorting, in every dtype."""

from __future__ import annotations

import pytest
import torch

from ecoflap.allocation.patterns import NofM, Pattern, Unstructured
from ecoflap.errors import NonFiniteLoss, UnknownName
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.registry import CRITERIA, is_global


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (13, 1), (9, 22)])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 1.0])
def test_smallest_of_the_matrix_go(dtype: torch.dtype, shape: tuple[int, int], part: float) -> None:
    weight = torch.randn(shape).to(dtype)
    original = weight.clone()
    zeros = round(part * weight.numel())
    pruned, mask = Magnitude()(weight, None, zeros, Unstructured())
    order = sorted(range(weight.numel()), key=lambda i: (abs(float(weight.flatten()[i])), i))
    expected = torch.ones(weight.numel(), dtype=torch.bool)
    expected[order[:zeros]] = False
    assert torch.equal(mask, expected.reshape(shape))
    assert torch.equal(pruned, torch.where(mask, original, torch.zeros_like(original)))
    assert pruned.dtype == dtype
    assert torch.equal(weight, original)
    assert pruned.data_ptr() != weight.data_ptr()


def test_sign_does_not_matter() -> None:
    weight = torch.tensor([[-5.0, 1.0], [-0.5, 3.0]])
    assert Magnitude()(weight, None, 2, Unstructured()).weight.tolist() == [[-5.0, 0.0], [0.0, 3.0]]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured("row"), [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 30.0, 40.0]]),
        (Unstructured("matrix"), [[0.0, 0.0, 0.0, 0.0], [10.0, 20.0, 30.0, 40.0]]),
        (NofM(1, 2), [[0.0, 2.0, 0.0, 4.0], [0.0, 20.0, 0.0, 40.0]]),
    ],
)
def test_patterns(pattern: Pattern, expected: list[list[float]]) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert Magnitude()(weight, None, 4, pattern).weight.tolist() == expected


def test_zeros_that_are_there_already_are_the_first() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    pruned = Magnitude()(weight, None, 3, Unstructured())
    assert pruned.weight.tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert Magnitude()(weight, None, 1, Unstructured()).mask.tolist() == [[False, True, True, True]]


def test_broken_weights_are_refused() -> None:
    with pytest.raises(NonFiniteLoss):
        Magnitude()(torch.tensor([[1.0, float("nan")]]), None, 1, Unstructured())
    with pytest.raises(NonFiniteLoss, match="NaN or infinite"):
        Magnitude()(torch.tensor([[1.0, float("inf")]]), None, 1, Unstructured())


def test_a_weight_that_requires_grad() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    assert not Magnitude()(weight, None, 5, Unstructured()).weight.requires_grad


def test_registry() -> None:
    names = ["wanda", "sparsegpt", "admm", "magnitude"]
    assert [name for name in CRITERIA if not is_global(name)] == names
    for name in names:
        criterion = CRITERIA.get(name)()
        assert criterion.name == name
        assert criterion.statistics in ("none", "norm", "gram", "pair")
        assert criterion.default_compare in ("row", "matrix")
    with pytest.raises(UnknownName, match="did you mean 'wanda'"):
        CRITERIA.get("wnada")
