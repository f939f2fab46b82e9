"""Experts spread over modules of one stack each (JetMoE): their own tokens, and all tokens by a turned router."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from families.stacked import batches
from torch import Tensor, nn
from transformers import JetMoeConfig, JetMoeForCausalLM

from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.experts import router_of
from ecoflap.model.parts import Layer
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.statistics.turned_router import TurnedRouter

EXPERTS, CHOSEN = 4, 2
LEAVES = ("input_linear", "output_linear")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = JetMoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=12,
        num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = JetMoeForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gathered(
    model: nn.Module, data: list[dict[str, Tensor]], least: int
) -> tuple[dict[str, Layer], dict[str, InputStatistics]]:
    anatomy = discover(model, data[0])
    found: dict[str, InputStatistics] = {}
    choice = TokenChoice(experts=least)
    for _, part in dense_statistics(model, anatomy, data, default_objective(model), kind="gram", tokens=choice):
        found.update({name: one for name, one in part.items() if one is not None})
    return {layer.name: layer for layer in anatomy.layers if layer.stacked}, found


def test_the_matrices_of_one_expert_belong_together_and_padding_reaches_none(model: nn.Module) -> None:
    data = batches()
    layers, own = gathered(model, data, 0)
    per_expert = Counter(layer.expert for layer in layers.values())
    assert len(per_expert) == 2 * EXPERTS
    assert set(per_expert.values()) == {2}
    tokens = Counter[str]()
    for name, layer in layers.items():
        tokens[layer.parameter] += own[name].tokens if name in own else 0
    real = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert len(tokens) == 4
    assert set(tokens.values()) == {CHOSEN * real}


@pytest.mark.parametrize("path", ["mlp", "self_attention.experts"])
@torch.no_grad()
def test_few_tokens_are_filled_up_by_what_an_expert_gets_where_all_are_like_it(model: nn.Module, path: str) -> None:
    data = batches()
    for batch in data:
        batch["attention_mask"][:] = 1
    real, least = sum(batch["input_ids"].numel() for batch in data), 500
    _, own = gathered(model, data, 0)
    _, filled = gathered(model, data, least)
    for number in range(EXPERTS):
        like = copy.deepcopy(model)
        linears = {leaf: like.model.layers[0].get_submodule(f"{path}.{leaf}") for leaf in LEAVES}
        received: dict[str, list[Tensor]] = {leaf: [] for leaf in LEAVES}
        for leaf, linear in linears.items():
            linear.weight.copy_(linear.weight[number].expand_as(linear.weight).clone())
            linear.register_forward_pre_hook(
                lambda module, args, seen=received[leaf]: seen.append(args[0].double())  # of all experts
            )
        for batch in data:
            like(**batch)
        for leaf, parts in received.items():
            every = torch.cat(parts)
            assert len(every) == CHOSEN * real  # each token once for each expert that it is sent to
            name = f"model.layers.0.{path}.{leaf}.weight[{number}]"
            mine = own[name].moments.double() if name in own else 0
            missing = least - (own[name].tokens if name in own else 0)
            expected = mine + missing * (every.T @ every) / len(every)
            torch.testing.assert_close(filled[name].moments.double(), expected, rtol=1e-4, atol=1e-4)
            assert filled[name].tokens == least


def test_an_expert_that_does_not_get_all_tokens_tells_that_its_router_did_not_obey() -> None:
    router = TurnedRouter(nn.Linear(4, 3))
    layer = router._router
    with router.to(2):
        assert layer(torch.randn(5, 4)).argmax(-1).tolist() == [2] * 5
        router.note(5)
        router.note(1)  # its second matrix is no matter
    assert router.obeyed
    with router.to(1):
        layer(torch.randn(5, 4))
        router.note(4)
    assert not router.obeyed
    assert layer(torch.zeros(1, 4)).equal(layer.bias[None])


def test_a_router_is_the_only_linear_layer_with_one_output_an_expert(model: nn.Module) -> None:
    path = "model.layers.0.mlp"
    assert router_of(model, path, EXPERTS) == f"{path}.router.layer"
    assert router_of(model, path, EXPERTS + 1) is None
