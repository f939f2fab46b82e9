"""AlphaPruning: the Hill estimator on spectra that are known, and the scores that it gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picos import FAMILIES

from ecoflap import api
from ecoflap.data.objectives import default_objective
from ecoflap.importance.alphapruning import above_peak, hill, spectrum
from ecoflap.importance.measure import measure_importance
from ecoflap.model.anatomy import discover


def with_singular_values(values: list[float], rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, len(values)) fp32 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(values, dtype=torch.float64) @ right).float()


def slow_alpha(weight: np.ndarray) -> float:
    """PL_Alpha_Hill with k half of the eigenvalues of WᵀW, one logarithm at a time."""
    eigenvalues = sorted(np.linalg.eigvalsh(weight.T.astype(np.float64) @ weight.astype(np.float64)))
    eigenvalues = eigenvalues[-min(weight.shape) :]
    n, k = len(eigenvalues), len(eigenvalues) // 2
    return 1 + k / sum(math.log(eigenvalues[n - i] / eigenvalues[n - k - 1]) for i in range(1, k + 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 10_000))
def test_alpha_is_hills_estimate(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = hill(spectrum(weight), len(spectrum(weight)) // 2)
    assert found == pytest.approx(slow_alpha(weight.numpy()), rel=1e-3)


def test_alpha_of_a_power_law() -> None:
    # Quantiles of a density proportional to x^-α: the estimate comes near the exponent.
    for alpha in (2.0, 3.5):
        quantiles = [(1 - (i + 0.5) / 4000) ** (-1 / (alpha - 1)) for i in range(4000)]
        assert hill(torch.tensor(quantiles, dtype=torch.float64), 2000) == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scale_does_not_matter(scale: float) -> None:
    weight = with_singular_values([1.0, 2.0, 3.0, 5.0, 8.0, 13.0], 9)
    expected = slow_alpha(weight.numpy())
    assert hill(spectrum(weight * scale), 3) == pytest.approx(expected, rel=1e-4)
    assert hill(spectrum(weight.t() * scale), 3) == pytest.approx(expected, rel=1e-4)


def test_defined_cases() -> None:
    assert hill(spectrum(torch.zeros(4, 6)), 0) == math.inf
    assert hill(spectrum(torch.eye(6)), 3) == math.inf  # all eigenvalues equal: no tail
    assert hill(spectrum(torch.ones(5, 7)), 1) == math.inf  # rank one
    deficient = with_singular_values([1.0, 2.0, 4.0, 8.0], 6) @ torch.randn(4, 12)
    assert len(spectrum(deficient)) == 4  # twelve columns, four of them free
    assert above_peak(spectrum(torch.zeros(3, 3))) == 0
    assert above_peak(torch.tensor([2.0, 2.0], dtype=torch.float64)) == 0


def test_peak() -> None:
    # Most eigenvalues crowd near 1, and a tail of ten goes up to a thousand.
    crowd = torch.linspace(0.95, 1.05, 50, dtype=torch.float64)
    tail = torch.logspace(0.5, 3, 10, dtype=torch.float64)
    eigenvalues = torch.cat([torch.full((3,), 0.1, dtype=torch.float64), crowd, tail])
    count = above_peak(eigenvalues)
    logs = np.log10(eigenvalues.numpy())
    heights, edges = np.histogram(logs, bins=100)
    assert count == int((logs > edges[heights.argmax()]).sum())
    assert 10 < count <= 60
    assert above_peak(eigenvalues, bins=1) == 60  # above the lowest, which three share


def test_scores_turn_alpha_round_and_blocks_take_the_plain_mean() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(2, 2)
    anatomy = discover(model, batches[0], run=default_objective(model))
    found = measure_importance(model, batches, "alphapruning", anatomy=anatomy)
    alphas = {layer.name: slow_alpha(model.get_parameter(layer.name).detach().numpy()) for layer in anatomy.layers}
    for name, alpha in alphas.items():
        assert found.scores[name].score == pytest.approx(max(alphas.values()) - alpha, abs=2e-3 * max(alphas.values()))
        assert (found.scores[name].stderr, found.scores[name].n) == (0, 1)
    # The published map of block means to sparsities.
    blocks = [block for block in anatomy.blocks if block.layers]
    means = np.array([np.mean([alphas[layer.name] for layer in block.layers]) for block in blocks])
    sizes = np.array([block.numel for block in blocks])
    ratios = (means - means.min()) / (means.max() - means.min()) * 0.6 + 0.7
    ratios *= 0.5 * sizes.sum() / (sizes * ratios).sum()
    allocation = api.allocate(found, 0.5)
    for block, ratio, size in zip(blocks, ratios, sizes, strict=True):
        zeros = sum(allocation[layer.name].zeros for layer in block.layers)
        assert zeros / size == pytest.approx(ratio, abs=5e-3)
    peak = measure_importance(model, batches, "alphapruning", tail="peak", anatomy=anatomy)
    assert peak.scores != found.scores


def test_a_matrix_without_a_tail_keeps_least() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    anatomy = discover(model, batches[0], run=default_objective(model))
    with torch.no_grad():
        model.get_parameter(anatomy.layers[0].name).copy_(torch.eye(*anatomy.layers[0].shape))
        model.get_parameter(anatomy.layers[1].name).zero_()
    scores = measure_importance(model, batches, "alphapruning", anatomy=anatomy).scores
    assert scores[anatomy.layers[0].name].score == scores[anatomy.layers[1].name].score == 0
    assert max(score.score for score in scores.values()) > 0
