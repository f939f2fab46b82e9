"""Random directions have the filters' norms, slices go through the model's own loss, weights are never written to."""

from __future__ import annotations

import math
from types import SimpleNamespace

import picos
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import Given

from ecoflap.model.parts import Layer
from ecoflap.report.analysis.landscape import LINE, PLANE, Slices, compute, direction


def _layer(shape: tuple[int, int], transposed: bool, name: str = "a.weight") -> Layer:
    return Layer(name, "a", "block", "tower", "language", shape, transposed=transposed)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_each_row_has_the_norm_of_the_weights(rows: int, columns: int, flip: bool, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < 0.6  # some rows may be zero in whole
    stored = weight.t().contiguous() if flip else weight
    found = direction(stored, _layer((rows, columns), flip), 0, seed, masked)
    found = found.t() if flip else found
    for row, wanted in zip(found, weight, strict=True):
        assert float(row.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5, abs=1e-30)
    if masked:
        assert not found[weight == 0].any()


def test_directions_depend_on_seed_layer_and_number_alone() -> None:
    weight = torch.randn(4, 5)
    first = direction(weight, _layer((4, 5), False), 0, 0)
    assert torch.equal(first, direction(weight, _layer((4, 5), False), 0, 0))
    for other in (
        direction(weight, _layer((4, 5), False), 1, 0),
        direction(weight, _layer((4, 5), False), 0, 1),
        direction(weight, _layer((4, 5), False, "b.weight"), 0, 0),
    ):
        assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_point_is_the_loss_at_moved_weights(name: str) -> None:
    made = Given(name)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}

    def loss(model: torch.nn.Module) -> float:
        return float(made.objective(model, made.batches[0]))

    with torch.no_grad():
        slices = Slices(made.model, made.anatomy.layers, loss, seed=3, masked=False)
        found = {point: slices.loss(*point) for point in ((0.0, 0.0), (0.4, 0.0), (0.4, -0.6))}
        assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
        assert found[0.0, 0.0] == loss(made.model)
        for (alpha, beta), value in found.items():
            other = picos.FAMILIES[name].build()
            for layer in made.anatomy.layers:
                weight = other.get_parameter(layer.name)
                parts = [direction(before[layer.name], layer, number, 3) for number in (0, 1)]
                weight.data.copy_(before[layer.name] + alpha * parts[0] + beta * parts[1])
            assert value == pytest.approx(float(made.objective(other, made.batches[0])), rel=1e-4)
    assert len({round(value, 6) for value in found.values()}) == 3


def test_slices_of_both_models_go_through_their_losses() -> None:
    made, other = Given("llama"), Given("llama")
    with torch.no_grad():
        for layer in other.anatomy.layers:
            weight = other.model.get_parameter(layer.name)
            weight.mul_(weight.abs() > weight.abs().median())
    subject = SimpleNamespace(**vars(made), pruned=other.model, recipe=SimpleNamespace(seed=0))
    data = compute(subject)  # type: ignore[arg-type]
    first = made.batches[:2]  # the first half of three batches
    for which, model in (("dense", made.model), ("pruned", other.model)):
        centre = sum(made.objective(model, batch).item() for batch in first) / len(first)
        line, plane = data["line"][which], data["plane"][which]
        assert line[LINE.index(0.0)] == pytest.approx(centre, rel=1e-6)
        assert plane[PLANE.index(0.0)][PLANE.index(0.0)] == line[LINE.index(0.0)]
        assert [row[PLANE.index(0.0)] for row in plane] == [line[LINE.index(alpha)] for alpha in PLANE]
        assert all(math.isfinite(value) for row in plane for value in row)
        assert len(set(line)) == len(LINE)
    assert data["line"]["dense"] != data["line"]["pruned"]
