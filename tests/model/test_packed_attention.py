"""nn.MultiheadAttention: q, k, v and the output are layers, by what enters them, whatever calls the module."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import picos
import pytest
import torch
from families.matrix import allocation_of, bits
from test_every_matrix import check_each_matrix_once
from torch import Tensor, nn
from torch.nn import functional as F

from ecoflap import api
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.projections import Probe
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.slices import matrix_in, stored_matrix
from ecoflap.pruning.keep_zeros import keep_zeros
from ecoflap.statistics.dense import dense_norms

WIDTH, HEADS = 16, 2


class Crossing(nn.Module):
    """Self-attention, attention to other tokens, and a small network."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        if not self.batch_first:
            x, others = x.transpose(0, 1), others.transpose(0, 1)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.cross_attn(x, others, others * 2, need_weights=False)[0]
        x = x + self.mlp(x)
        return x if self.batch_first else x.transpose(0, 1)


class Model(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, WIDTH)
        self.blocks = nn.ModuleList(Crossing(batch_first) for _ in range(2))

    def forward(self, input_ids: Tensor, others: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, others)
        return x.square().mean()


class Encoder(nn.Module):
    """torch's own encoder, which takes a path of its own where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, dropout=0.0) for _ in range(2)
        )

    def forward(self, input_ids: Tensor, others: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


MODELS = {"first": Model, "second": lambda: Model(False), "encoder": Encoder}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch)


@cache
def made(name: str) -> tuple[nn.Module, list[dict[str, Tensor]], Anatomy]:
    model = picos.scramble(MODELS[name](), 0).eval()
    random = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(5, 60, (2, 5), generator=random),
            "others": torch.randn(2, 3, WIDTH, generator=random),
        }
        for _ in range(2)
    ]
    return model, batches, discover(model, batches[0], run=loss)


def attended(attention: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, tokens, features) before the output layer, written out."""
    heads = []
    matrices = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3) if attention.in_proj_bias is not None else (None,) * 3
    for x, matrix, bias in zip((q, k, v), matrices, biases, strict=True):
        heads.append(F.linear(x, matrix, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2))
    weights = (heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1)
    return (weights @ heads[2]).transpose(1, 2).flatten(2)


def expected_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What enters the matrices of the blocks, by formulas of their own."""
    found = {}
    x, others = model.embed(batch["input_ids"]), batch["others"]
    for number, block in enumerate(model.blocks):
        calls = {"attn": (x, x, x)}
        inner = attended(block.attn, x, x, x)
        found[f"blocks.{number}.attn.out_proj.weight"] = inner
        x = x + block.attn.out_proj(inner)
        calls["cross_attn"] = (x, others, others * 2)
        inner = attended(block.cross_attn, *calls["cross_attn"])
        found[f"blocks.{number}.cross_attn.out_proj.weight"] = inner
        x = x + block.cross_attn.out_proj(inner)
        x = x + block.mlp(x)
        for name, inputs in calls.items():
            for part, one in enumerate(inputs):
                found[f"blocks.{number}.{name}.in_proj_weight[{part}]"] = one
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_a_layer(name: str) -> None:
    model, _, anatomy = made(name)
    check_each_matrix_once(model, anatomy)
    assert anatomy.unprunable == ()
    attentions = 1 if name == "encoder" else 2
    assert len(anatomy.layers) == 2 * (4 * attentions + 2)
    assert discover(model).layers == tuple(anatomy.layers)


@pytest.mark.parametrize("name", ["first", "second"])
def test_statistics_are_of_what_enters_each_matrix(name: str) -> None:
    model, batches, anatomy = made(name)
    before = bits(model)
    norms = dense_norms(model, anatomy, batches, loss)
    assert bits(model) == before
    with torch.no_grad():
        inputs = [expected_inputs(model, batch) for batch in batches]
    for layer in inputs[0]:
        x = torch.cat([one[layer].flatten(0, 1) for one in inputs]).double()
        assert norms[layer].tokens == len(x)
        torch.testing.assert_close(norms[layer].norm.double(), x.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm"])
def test_each_matrix_gets_the_zeros_asked_for(name: str, criterion: str) -> None:
    model, batches, anatomy = made(name)
    model = copy.deepcopy(model)
    allocation = allocation_of(anatomy)
    _, unreached = api.prune_to(model, anatomy, allocation, batches, criterion=criterion, loss=loss)
    assert unreached == ()
    for layer in anatomy.layers:
        assert int((stored_matrix(model, layer.name) == 0).sum()) == allocation[layer.name].zeros
    if criterion == "wanda" and name != "encoder":
        with torch.no_grad():
            inputs = [expected_inputs(made(name)[0], batch) for batch in batches]
        first = "blocks.0.cross_attn.in_proj_weight[1]"  # whose input is that of the dense model
        norm = torch.cat([one[first].flatten(0, 1) for one in inputs]).norm(dim=0)
        scores = stored_matrix(made(name)[0], first).abs() * norm
        zero = stored_matrix(model, first) == 0
        assert all(row[out].max() <= row[~out].min() * (1 + 1e-5) for row, out in zip(scores, zero, strict=True))
    with keep_zeros(model, include=["*in_proj_weight"]) as keeper:
        assert keeper is not None
        with torch.no_grad():
            for block in model.blocks:  # type: ignore[union-attr]
                (block.self_attn if name == "encoder" else block.attn).in_proj_weight += 1
    assert int((stored_matrix(model, anatomy.layers[0].name) == 0).sum()) == allocation[anatomy.layers[0].name].zeros


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_gradient_norms_of_each_matrix(name: str) -> None:
    model, batches, anatomy = made(name)
    owners = {layer.parameter for layer in anatomy.layers}
    gradients = dict(
        zip(owners, torch.autograd.grad(loss(model, batches[0]), [model.get_parameter(n) for n in owners]), strict=True)
    )
    exact = measure_importance(model, batches[:1], anatomy=anatomy, loss=loss, importance="gradient-norm").scores
    guess = measure_importance(
        model, batches[:1], anatomy=anatomy, loss=loss, importance="zeroth-order", draws=30, epsilon=1e-3
    ).scores
    for layer in anatomy.layers:
        gradient = gradients[layer.parameter]
        if layer.stacked:
            gradient = gradient.chunk(3)[int(layer.name[-2])]
        norm = float(gradient.norm()) * math.sqrt(2 / math.pi)
        assert exact[layer.name].score == pytest.approx(norm, rel=1e-4)
        assert abs(guess[layer.name].score - norm) < 6 * norm * 0.756 / math.sqrt(30) + 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_is_the_projection_of_the_gradient_on_the_noise(name: str) -> None:
    model, batches, anatomy = made(name)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = measure_importance(model, batches[:1], anatomy=anatomy, loss=loss, importance="forward-mode")
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert "fallback" not in found.settings
    gradients = dict(
        zip(owners := sorted({layer.parameter for layer in anatomy.layers}),
            torch.autograd.grad(loss(model, batches[0]), [model.get_parameter(n) for n in owners]), strict=True)
    )  # fmt: skip
    context = ProbeContext(model, anatomy, batches[:1], loss, seed=0)
    for layer in anatomy.layers:
        (noise,) = Probe(context, (layer,), 0, 0).noises()
        projection = (matrix_in(gradients[layer.parameter], layer.name) * noise).sum()
        assert found.scores[layer.name].score == pytest.approx(abs(float(projection)), rel=1e-3, abs=1e-6)
