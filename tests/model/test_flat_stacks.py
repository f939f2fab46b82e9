"""Experts whose matrices lie one above another in two dimensions (DBRX); mixtures that nothing reached."""

from __future__ import annotations

import copy
from typing import Any

import picos
import pytest
import torch
import torch.nn.functional as F
from families.stacked import batches, build
from torch import Tensor, nn
from transformers import DbrxConfig, DbrxForCausalLM

import ecoflap
from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import parameter_of
from ecoflap.model.slices import matrix_in, slice_name, stored_matrix
from ecoflap.model.swapping import layers_swapped
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics

EXPERTS, WIDTH, INNER = 4, 16, 12
LEAVES = ("w1", "v1", "w2")


@pytest.fixture
def model() -> nn.Module:
    config = DbrxConfig(
        d_model=WIDTH, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=64, pad_token_id=picos.PAD,
        attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": INNER, "hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    )  # fmt: skip
    found: nn.Module = picos.scramble(DbrxForCausalLM(config), 0)
    return found.eval()


def test_their_names_say_how_many_there_are() -> None:
    name = slice_name("ffn.experts.mlp.w1", 2, 3)
    assert name == "ffn.experts.mlp.w1[2/3]"
    assert parameter_of(name) == "ffn.experts.mlp.w1"
    flat = torch.randn(12, 5)
    assert torch.equal(matrix_in(flat, name), flat[8:12])
    assert matrix_in(flat, name).data_ptr() == flat[8:].data_ptr()


def test_each_expert_has_its_layers_in_their_true_orientation(model: nn.Module) -> None:
    anatomy = discover(model, batches()[0])
    slices = {layer.name: layer for layer in anatomy.layers if layer.stacked}
    path = "transformer.blocks.0.ffn.experts.mlp"
    assert set(slices) == {slice_name(f"{path}.{leaf}", n, EXPERTS) for leaf in LEAVES for n in range(EXPERTS)}
    for name, layer in slices.items():
        assert layer.expert == f"{path}[{name[-4]}]"
        assert layer.transposed == (".w2" in name)
        assert layer.shape == ((WIDTH, INNER) if ".w2" in name else (INNER, WIDTH))
    assert [entry.reason for entry in anatomy.unprunable] == ["router of experts, dense by default (--include)"]
    assert any("calibration data show" in entry.reason for entry in discover(model).unprunable)


@torch.no_grad()
def test_other_matrices_in_their_place_are_as_if_they_were_written(model: nn.Module) -> None:
    batch = batches()[0]
    layers = [layer for layer in discover(model, batch).layers if layer.stacked]
    others = [(layer, torch.randn_like(stored_matrix(model, layer.name))) for layer in (layers[0], layers[-1])]
    with layers_swapped(model, others):
        ours = model(**batch).logits
    before = model(**batch).logits
    for layer, other in others:
        stored_matrix(model, layer.name).copy_(other)
    assert torch.equal(ours, model(**batch).logits)
    assert not torch.equal(ours, before)


@pytest.mark.parametrize("least", [0, 15])
@torch.no_grad()
def test_statistics_are_those_of_each_experts_tokens_and_what_they_lack(model: nn.Module, least: int) -> None:
    data = batches()
    anatomy = discover(model, data[0])
    ffn = model.get_submodule("transformer.blocks.0.ffn")
    entered: list[Tensor] = []
    handle = ffn.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    for batch in data:
        model(**batch)
    handle.remove()
    real = torch.cat([x[batch["attention_mask"] == 1] for x, batch in zip(entered, data, strict=True)])
    chosen = ffn.router.layer(real).softmax(-1).topk(2, dim=-1).indices
    found: dict[str, Any] = {}
    choice = TokenChoice(experts=least)
    for _, statistics in dense_statistics(model, anatomy, data, default_objective(model), kind="gram", tokens=choice):
        found.update(statistics)

    def moments(x: Tensor, number: int, leaf: str) -> Tensor:
        w1, v1 = (matrix_in(ffn.experts.mlp.get_parameter(one), f"{one}[{number}/{EXPERTS}]") for one in ("w1", "v1"))
        x = (F.silu(x @ w1.T) * (x @ v1.T) if leaf == "w2" else x).double()
        return x.T @ x

    for number in range(EXPERTS):
        own = real[(chosen == number).any(dim=1)]
        for leaf in LEAVES:
            expected = moments(own, number, leaf)
            if len(own) < least:
                expected = expected + moments(real, number, leaf) * (least - len(own)) / len(real)
            statistic = found[slice_name(f"transformer.blocks.0.ffn.experts.mlp.{leaf}", number, EXPERTS)]
            if not len(own) and not least:
                assert statistic is None
                continue
            assert statistic.tokens == max(len(own), least)
            torch.testing.assert_close(statistic.moments.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm"])
def test_a_dbrx_is_pruned_to_the_weight(model: nn.Module, criterion: str) -> None:
    before = copy.deepcopy(model.state_dict())
    result = ecoflap.prune(model, batches(), 0.5, importance="gradient-norm", criterion=criterion, granularity="expert")
    for row in result.allocation.layers:
        assert int((stored_matrix(model, row.name) == 0).sum()) == row.zeros
    pruned = {parameter_of(row.name) for row in result.allocation.layers}
    assert {f"transformer.blocks.0.ffn.experts.mlp.{leaf}" for leaf in LEAVES} <= pruned
    for name, tensor in model.state_dict().items():
        assert name in pruned or torch.equal(tensor, before[name])


def test_a_mixture_that_no_token_reached_lies_as_its_like() -> None:
    model, batch = (
        build("Llama4Text", num_hidden_layers=2, moe_layers=[0, 1], layer_types=["full_attention"] * 2),
        batches()[0],
    )
    whole = discover(model, batch).layers
    experts = model.get_submodule("model.layers.1.feed_forward.experts")
    experts.forward = lambda hidden_states: hidden_states * 0  # as if all tokens went to experts that do nothing
    assert discover(model, batch).layers == whole
