"""Each expert's slice of a stacked parameter has the statistics of the real tokens that its router sends to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.stacked import EXPERTS, LAYOUTS, batches, build
from torch import Tensor, nn

from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics

LIMIT = 7.0  # of GPT-OSS's gates


@contextmanager
def noted(module: nn.Module, seen: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: seen(args))
    try:
        yield
    finally:
        handle.remove()


def inner_of(layout: str, experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What the expert's second matrix receives, (tokens, inner), by the formula of each family."""
    weight = experts.gate_up_proj[expert]
    if layout == "GptOss":
        both = x @ weight + experts.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=LIMIT), both[:, 1::2].clamp(-LIMIT, LIMIT)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (x @ (weight if layout == "Llama4Text" else weight.T)).chunk(2, dim=1)
    return F.silu(gate) * up


def by_hand(
    layout: str, model: nn.Module, data: list[dict[str, Tensor]], *, everywhere: bool = False
) -> dict[str, tuple[Tensor, int]]:
    """XᵀX of each slice and its number of tokens, in fp64: the router is run in the test, one token at a time.

    Args:
        everywhere: all experts get all tokens.
    """
    block = model.model.layers[0]
    mixture = block.feed_forward if layout == "Llama4Text" else block.mlp
    router = mixture.router if layout in ("GptOss", "Llama4Text") else mixture.gate
    received: list[Tensor] = []
    with torch.no_grad(), noted(mixture, lambda args: received.append(args[0])):
        for batch in data:
            model(**batch)
    rows: dict[int, list[Tensor]] = {expert: [] for expert in range(EXPERTS)}
    scaled = layout == "Llama4Text"  # tokens enter scaled by what the router finds
    for x, batch in zip(received, data, strict=True):
        for token, real in zip(x.flatten(0, 1), batch["attention_mask"].flatten(), strict=True):
            if not real:
                continue
            if everywhere and not scaled:
                for kept in rows.values():
                    kept.append(token)
                continue
            found = router(token[None])
            if scaled:
                for expert, share in enumerate(found[0][0]):
                    if share > 0:
                        for one in range(EXPERTS) if everywhere else (expert,):
                            rows[one].append(token * share)
                continue
            for expert in found[-1][0].tolist():
                rows[expert].append(token)
    sums: dict[str, tuple[Tensor, int]] = {}
    path = next(name for name, module in model.named_modules() if module is mixture.experts)
    for expert, tokens in rows.items():
        width = model.config.hidden_size
        x = torch.stack(tokens) if tokens else torch.zeros(0, width)
        inner = inner_of(layout, mixture.experts, expert, x)
        for leaf, inputs in (("gate_up_proj", x), ("down_proj", inner)):
            sums[f"{path}.{leaf}[{expert}]"] = (inputs.double().T @ inputs.double(), len(tokens))
    return sums


@pytest.mark.parametrize("kind", ["norm", "gram"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_statistics_of_each_expert_are_those_of_its_own_real_tokens(layout: str, kind: str) -> None:
    model, data = build(layout), batches()
    anatomy = discover(model, data[0])
    expected = by_hand(layout, model, data)
    found = {}
    own = TokenChoice(experts=0)
    for _, statistics in dense_statistics(model, anatomy, data, default_objective(model), kind=kind, tokens=own):
        found.update(statistics)
    slices = [layer for layer in anatomy.layers if layer.stacked]
    assert {layer.name for layer in slices} == set(expected)
    assert sum(count for _, count in expected.values()) > 0
    for layer in slices:
        moments, tokens = expected[layer.name]
        statistic = found[layer.name]
        if not tokens:
            assert statistic is None
            continue
        assert statistic.tokens == tokens, layer.name
        assert layer.shape[1] == len(moments)
        torch.testing.assert_close(statistic.norm.double() ** 2, moments.diagonal(), rtol=1e-4, atol=1e-6)
        if kind == "gram":
            torch.testing.assert_close(statistic.moments.double(), moments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["norm", "gram", "pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_missing_tokens_are_average_tokens_of_all_that_enter_the_mixture(layout: str, kind: str) -> None:
    model, data, least = build(layout), batches(), 15
    anatomy = discover(model, data[0])
    own, every = by_hand(layout, model, data), by_hand(layout, model, data, everywhere=True)
    assert any(count < least for _, count in own.values())
    assert any(count >= least for _, count in own.values())
    found = {}
    choice = TokenChoice(experts=least)
    for _, statistics in dense_statistics(model, anatomy, data, default_objective(model), kind=kind, tokens=choice):
        found.update(statistics)
    for name, (moments, tokens) in own.items():
        others, count = every[name]
        expected = moments + others * (max(0, least - tokens) / count)
        statistic = found[name]
        assert statistic.tokens == max(tokens, least)
        torch.testing.assert_close(statistic.norm.double() ** 2, expected.diagonal(), rtol=1e-4, atol=1e-6)
        if kind != "norm":
            torch.testing.assert_close(statistic.moments.double(), expected, rtol=1e-4, atol=1e-4)
        if kind == "pair":
            torch.testing.assert_close(statistic.cross.double(), expected, rtol=1e-4, atol=1e-4)
