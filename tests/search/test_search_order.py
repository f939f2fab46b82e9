"""The order of removal is the criterion's own, and a local error is the sum over what really goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import subject
from torch import Tensor, nn

from ecoflap.allocation.patterns import Unstructured
from ecoflap.model.parts import Layer
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.wanda import Wanda
from ecoflap.search.order import LEVELS, Order, local_errors
from ecoflap.statistics.dense import dense_norms
from ecoflap.statistics.inputs import InputNorm


class One(nn.Module):
    """A single matrix, stored as Conv1D does (input, output) if ``transposed``."""

    def __init__(self, rows: int, columns: int, transposed: bool, seed: int = 0, steps: int = 0) -> None:
        super().__init__()
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        if steps:  # many equal weights
            weight = (weight * steps).round() / steps
        self.fc = nn.Linear(1, 1, bias=False)
        self.fc.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
        self.layer = Layer("fc.weight", "fc", "block", "tower", "", (rows, columns), transposed=transposed)

    @property
    def matrix(self) -> Tensor:
        weight = self.fc.weight.detach()
        return weight.t() if self.layer.transposed else weight


def inputs(columns: int, seed: int = 0) -> InputNorm:
    generator = torch.Generator().manual_seed(1000 + seed)
    found = InputNorm(columns)
    found.update(torch.randn(13, columns, generator=generator) * torch.rand(columns, generator=generator) * 4)
    return found


CASES = given(
    rows=st.integers(1, 7), columns=st.integers(1, 40), seed=st.integers(0, 99), transposed=st.booleans(),
    compare=st.sampled_from([None, "row", "matrix"]), steps=st.sampled_from([0, 2]), data=st.data(),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@CASES
def test_the_mask_is_that_of_the_criterion(
    rows: int, columns: int, seed: int, transposed: bool, compare: str | None, steps: int, data: st.DataObject
) -> None:
    model, norm = One(rows, columns, transposed, seed, steps), inputs(columns, seed)
    zeros = data.draw(st.integers(0, rows * columns))
    for criterion in (Wanda(), Magnitude()):
        order = Order.of({"fc.weight": norm}, needs=criterion.statistics, compare=compare)
        mask = order.mask(model, model.layer, zeros)
        pruned, kept = criterion(model.matrix, norm, zeros, Unstructured(compare))
        assert torch.equal(mask, kept)
        assert int((~mask).sum()) == zeros
        assert torch.equal(pruned, model.matrix * mask)


@settings(max_examples=40, deadline=None)
@CASES
def test_errors_are_the_squared_scores_of_what_goes(
    rows: int, columns: int, seed: int, transposed: bool, compare: str | None, steps: int, data: st.DataObject
) -> None:
    model, norm = One(rows, columns, transposed, seed, steps), inputs(columns, seed)
    costs = (model.matrix.double() * norm.norm.double()).square()
    for needs in ("norm", "gram", "none"):
        order = Order.of({"fc.weight": norm}, needs=needs, compare=compare)
        errors = order.errors(model, model.layer)
        assert errors.shape == (LEVELS + 1,)
        assert errors.dtype == torch.float64
        # At i/50 of the matrix, or of each row: as many whole weights as that comes to.
        unit = rows if order.compare == "row" else 1
        for i in range(0, LEVELS + 1, 5):
            zeros = unit * round(i * ((rows * columns // unit) / LEVELS))  # this order: a half may go either way
            gone = costs[~order.mask(model, model.layer, zeros)].sum()
            assert float(errors[i]) == pytest.approx(float(gone), rel=1e-5, abs=1e-9)
        assert (errors.diff() >= 0).all()


def test_a_layer_without_inputs_goes_by_magnitude() -> None:
    model = One(5, 30, False)
    order = Order.of({}, needs="norm", compare=None)
    assert torch.equal(order.mask(model, model.layer, 61), Magnitude()(model.matrix, None, 61, Unstructured("row"))[1])
    assert float(order.errors(model, model.layer)[-1]) == pytest.approx(float(model.matrix.square().sum()))


@pytest.mark.parametrize("name", ["gpt2", "experts", "shared_llama", "blip2_t5"])
def test_every_layer_of_a_model(name: str) -> None:
    it = subject(name)
    norms = dense_norms(it.model, it.anatomy, it.batches, it.loss)
    order = Order.of(norms, needs="norm", compare=None)
    errors = local_errors(it.model, it.anatomy, order)
    assert list(errors) == [layer.name for layer in it.anatomy.layers]
    for layer in it.anatomy.layers:
        weight = it.model.get_parameter(layer.name).detach()
        weight = weight.t() if layer.transposed else weight
        norm = norms[layer.name].norm if layer.name in norms else torch.ones(layer.shape[1])
        zeros = layer.numel // 3
        mask = order.mask(it.model, layer, zeros)
        assert mask.shape == layer.shape
        if layer.name in norms:
            assert torch.equal(mask, Wanda()(weight, norms[layer.name], zeros, Unstructured())[1])
        assert float(errors[layer.name][-1]) == pytest.approx(float((weight * norm).square().sum()), rel=1e-4)
