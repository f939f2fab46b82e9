"""Experts: padding that is routed to them does not count, and one without tokens is named."""

from __future__ import annotations

import copy
from typing import Any

import picos
import pytest
import torch
from families.matrix import allocation_of
from families.moe import Mixture, mixture_of_modules
from families.vision import Eva
from torch import nn

from ecoflap import api
from ecoflap.allocation.patterns import parse_pattern, with_default
from ecoflap.model.anatomy import discover
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.registry import CRITERIA
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.inputs import InputGram, InputNorm
from ecoflap.statistics.real_tokens import RoutedTokens, row_hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copied_rows_are_found_again_whatever_their_order(dtype: torch.dtype) -> None:
    tokens = torch.randn(3, 50, 7).to(dtype)
    real = torch.rand(3, 50) < 0.6
    order = torch.randperm(150)[:90]
    found = RoutedTokens(tokens, real).real_among(tokens.reshape(-1, 7)[order])
    assert found is not None
    assert torch.equal(found, real.reshape(-1)[order])
    assert len(row_hashes(tokens.reshape(-1, 7)).unique()) == len(tokens.reshape(-1, 7).unique(dim=0))
    changed = tokens.reshape(-1, 7)[order].clone()
    changed[3, 2] += 1
    assert RoutedTokens(tokens, real).real_among(changed) is None


def one_by_one(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same samples without their padding."""
    alone = []
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone.append({key: value[row : row + 1, mask] for key, value in batch.items()})
    return alone


def pruned(
    model: nn.Module, batches: list[dict[str, Any]], criterion: str, tokens: str | TokenChoice = "all"
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    model = copy.deepcopy(model)
    anatomy = discover(model, batches[0])
    result = api.prune_to(
        model,
        anatomy,
        allocation_of(anatomy),
        batches,
        criterion=criterion,
        pattern="unstructured",
        compare="row",
        tokens=tokens,
    )
    return model, anatomy, result[1]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_padding_that_is_routed_to_experts_does_not_count(criterion: str) -> None:
    padded = picos.FAMILIES["llama"].batches(8, 4, padding=True)
    assert any((batch["attention_mask"] == 0).any() for batch in padded)
    model = mixture_of_modules()
    first, anatomy, _ = pruned(model, padded, criterion)
    second, _, _ = pruned(model, one_by_one(padded), criterion)
    differing = {
        layer.name: int(((first.get_parameter(layer.name) == 0) != (second.get_parameter(layer.name) == 0)).sum())
        for layer in anatomy.layers
    }
    assert sum(differing.values()) <= (4 if criterion == "sparsegpt" else 0)  # a swap of two near-equal scores


def with_idle_experts() -> nn.Module:
    """Experts 2 and 3 are never chosen."""
    model = mixture_of_modules()
    mixture = Mixture(32, 16, chosen=1)
    mixture.load_state_dict(model.model.layers[1].mlp.state_dict())
    model.model.layers[1].mlp = mixture
    with torch.no_grad():  # one of the first two has the largest logit, whatever the token
        mixture.gate.weight[1:] = mixture.gate.weight[0] * torch.tensor([[-1.0], [0.5], [0.0]])
    return model


def test_an_expert_without_tokens_has_the_statistics_of_all_that_enter_the_mixture() -> None:
    model, batches = with_idle_experts(), picos.FAMILIES["llama"].batches(8, 4, padding=True)
    after, _, unreached = pruned(model, batches, "wanda")
    half = copy.deepcopy(model)  # as the walk has it when it comes to the second block
    half.model.layers[0].load_state_dict(after.model.layers[0].state_dict())
    entered: list[torch.Tensor] = []
    half.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            half(**batch)
    tokens = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(entered, batches, strict=True)])
    expert = half.model.layers[1].mlp.experts[3]
    inner = nn.functional.silu(expert.w1(tokens)) * expert.w3(tokens)
    for leaf, x in (("w1", tokens), ("w2", inner), ("w3", tokens)):
        name = f"model.layers.1.mlp.experts.3.{leaf}.weight"
        assert name in unreached
        scores = model.get_parameter(name).detach().double().abs() * x.double().square().sum(0).sqrt()
        zeros = after.get_parameter(name) == 0
        for row, mask in zip(scores, zeros, strict=True):
            assert row[mask].max() <= row[~mask].min() * (1 + 1e-5)


@pytest.mark.parametrize("criterion", ["wanda", "admm"])
def test_an_expert_without_tokens_is_named_and_pruned_by_magnitude_where_nothing_stands_in(criterion: str) -> None:
    model, batches = with_idle_experts(), picos.FAMILIES["llama"].batches(8, 4, padding=True)
    after, anatomy, unreached = pruned(model, batches, criterion, TokenChoice(experts=0))
    idle = {layer.name for layer in anatomy.layers if layer.expert.endswith(("experts.2", "experts.3"))}
    assert set(unreached) == idle
    assert len(idle) == 6
    allocation, pattern = allocation_of(anatomy), with_default(parse_pattern("unstructured", "row"), "row")
    for name in idle:
        expected = Magnitude()(model.get_parameter(name), None, allocation[name].zeros, pattern)
        assert torch.equal(after.get_parameter(name), expected.weight)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_layer_that_is_never_called_has_the_statistics_of_its_inputs(criterion: str) -> None:
    model, batches = Eva(), [{"x": torch.randn(4, 5, 8)} for _ in range(2)]
    after, anatomy, unreached = pruned(model, batches, criterion)
    assert not unreached
    layer = anatomy.layer("blocks.0.qkv.weight")
    statistics = {"norm": InputNorm, "gram": InputGram}[(rule := CRITERIA.get(criterion)()).statistics](8)
    for number, batch in enumerate(batches):
        statistics.begin(number)  # summed as the walk sums them: here it is about the last bits
        statistics.update(torch.tanh(batch["x"]))
    statistics.close()
    zeros, pattern = allocation_of(anatomy)[layer.name].zeros, with_default(parse_pattern("unstructured", "row"), "row")
    expected = rule(model.get_parameter(layer.name), statistics, zeros, pattern)
    assert torch.equal(after.get_parameter(layer.name), expected.weight)
