"""Histograms against numpy's, gradients against autograd's, local scores against inputs seen by hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subjects import Given

from ecoflap.report.analysis.distributions import LogHistogram, compute, mean_gradients


@given(st.lists(st.floats(1e-30, 1e30) | st.just(0.0), min_size=1, max_size=50), st.integers(1, 49))
def test_shares_are_numpys(found: list[float], cut: int) -> None:
    histogram = LogHistogram()
    for piece in (found[:cut], found[cut:]):  # piece by piece, with either sign
        histogram.add(torch.tensor(piece, dtype=torch.float64) * (-1) ** len(piece))
    data = histogram.to_json()
    logs = np.log10([value for value in found if value])
    assert data["zeros"] == pytest.approx(found.count(0.0) / len(found))
    assert sum(data["share"]) + data["zeros"] == pytest.approx(1)
    if not len(logs):
        assert (data["share"], data["median"]) == ([], None)
        return
    edges = np.array(data["log10_edges"])
    assert np.allclose(np.diff(edges), 0.1)
    near = np.abs(logs[:, None] * 10 - np.round(logs[:, None] * 10)).min() < 1e-6  # a value on an edge: either side
    if not near:
        assert np.allclose(np.histogram(logs, edges)[0] / len(found), data["share"])
    assert data["share"][0] > 0
    assert data["share"][-1] > 0


def test_the_median_is_that_of_the_values_that_are_not_zero() -> None:
    values = torch.randn(4001, generator=torch.Generator().manual_seed(0)).exp()
    histogram = LogHistogram()
    histogram.add(torch.cat([values, torch.zeros(5000)]))
    assert histogram.to_json()["median"] == pytest.approx(float(values.median()), rel=0.012)
    assert histogram.to_json()["zeros"] == pytest.approx(5000 / 9001)


def test_extreme_sizes_have_a_place() -> None:
    histogram = LogHistogram()
    histogram.add(torch.tensor([1e-45, 3e38, -1.0]))
    data = histogram.to_json()
    assert (data["log10_edges"][0] <= -44.8, data["log10_edges"][-1] >= 38.4) == (True, True)
    assert sum(data["share"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["llava", "gpt2", "t5"])
def test_mean_gradients_are_autograds(name: str) -> None:
    made = Given(name)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}

    class Task:
        def advance(self, steps: int = 1, detail: str = "") -> None:
            pass

    found = mean_gradients(made.model, made.anatomy, made.batches, made.objective, Task())
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    whole = sum(made.model(**batch).loss for batch in made.batches) / len(made.batches)
    whole.backward()
    assert set(found) == {layer.name for layer in made.anatomy.layers}
    for key, gradient in found.items():
        wanted = made.model.get_parameter(key).grad
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        assert torch.allclose(gradient, wanted, atol=1e-6), key


@pytest.mark.parametrize("name", ["llava", "gpt2"])
def test_the_three_distributions(name: str) -> None:
    made = Given(name)
    data = compute(made)  # type: ignore[arg-type]
    squares: dict[str, torch.Tensor] = {}
    modules = {layer.name: made.model.get_submodule(layer.module) for layer in made.anatomy.layers}

    def seen(key: str):
        def hook(module: object, args: tuple[torch.Tensor, ...]) -> None:
            columns = args[0].detach().flatten(0, -2).double().square().sum(0)
            squares[key] = squares.get(key, torch.zeros(len(columns), dtype=torch.float64)) + columns

        return hook

    for key, module in modules.items():
        module.register_forward_pre_hook(seen(key))
    with torch.no_grad():
        for batch in made.batches:
            made.model(**batch)
    for tower in made.anatomy.towers:
        values = {"weight": [], "local": []}
        for layer in tower.layers:
            weight = made.model.get_parameter(layer.name).detach().double().abs()
            values["weight"].append(weight.flatten())
            norm = squares[layer.name].sqrt() if layer.name in squares else None
            if norm is not None:
                values["local"].append((weight * (norm[:, None] if layer.transposed else norm[None])).flatten())
        for kind, parts in values.items():
            logs = torch.cat(parts).log10().numpy()
            found = data["towers"][tower.name][kind]
            assert found["median"] == pytest.approx(float(np.median(10**logs)), rel=0.02)
            expected = np.histogram(logs, np.array(found["log10_edges"]))[0] / len(logs)
            assert np.abs(expected - found["share"]).max() < 2 / len(logs) + 1e-3  # rounding at an edge
