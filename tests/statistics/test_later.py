"""Weights that are used in several places: the tokens of all uses count, when norms are taken and when it is pruned."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import shared
from families.matrix import allocation_of
from together import together
from torch import Tensor, nn

from ecoflap import api
from ecoflap.model.anatomy import discover
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.slices import stored_matrix
from ecoflap.statistics.dense import dense_norms

MODELS: dict[str, Callable[..., shared.Made]] = {
    "zamba2": shared.zamba2, "albert": shared.albert, "turns": shared.turns,
    "diffusion_gemma": shared.diffusion_gemma,
}  # fmt: skip


@cache
def made(name: str, padding: bool) -> tuple[nn.Module, Anatomy, Any, Any]:
    model, batches, loss = MODELS[name](padding)
    return model, discover(model, batches[0], run=loss), batches, loss


def inputs(model: nn.Module, layers: tuple[Layer, ...], batches: Any, loss: Any) -> dict[str, Tensor]:
    """(tokens, columns) of all calls of all modules that hold a layer's weight; padding out."""
    layers = tuple(layer for layer in layers if not layer.stacked)
    names = {id(model.get_submodule(path)): layer.name for layer in layers for path in layer.modules}
    seen: dict[str, list[Tensor]] = defaultdict(list)
    mask: list[Tensor] = []

    def hook(module: nn.Module, args: Any) -> None:
        x, real = args[0].detach().double(), mask[0].bool()
        seen[names[id(module)]].append(x[real] if x.shape[:-1] == real.shape else x.reshape(-1, x.shape[-1]))

    hooks = [module.register_forward_pre_hook(hook) for module in model.modules() if id(module) in names]
    with torch.no_grad():
        for batch in batches:
            mask[:] = [batch["attention_mask"]]
            loss(model, batch)
    for one in hooks:
        one.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_sums_over_all_uses(name: str) -> None:
    padding = name != "turns"  # whose blocks get no mask
    model, anatomy, batches, loss = made(name, padding)
    expected = inputs(model, anatomy.layers, batches, loss)
    found = dense_norms(model, anatomy, batches, loss)
    assert expected.keys() == {layer.name for layer in anatomy.layers if not layer.stacked}
    for layer, x in expected.items():
        assert found[layer].tokens == len(x), layer
        torch.testing.assert_close(found[layer].norm.double(), x.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_is_pruned_by_all_its_uses_at_its_turn(name: str) -> None:
    model, anatomy, batches, loss = made(name, False)
    pruned, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    allocation = allocation_of(anatomy, uniform=True)
    _, unreached = api.prune_to(pruned, anatomy, allocation, batches, criterion="wanda", loss=loss)
    assert all("expert" in name for name in unreached)
    for block in anatomy.blocks:  # Wanda, block after block, from whole forwards of the model as it is by then
        seen = inputs(by_hand, block.layers, batches, loss)
        for layer in block.layers:
            weight, mask = stored_matrix(by_hand, layer.name), stored_matrix(pruned, layer.name) == 0
            assert mask.sum() == allocation[layer.name].zeros
            if layer.stacked:  # of experts other tests tell
                weight[mask] = 0
                continue
            scores = weight.double().abs() * seen[layer.name].norm(dim=0)
            for row, out in zip(scores, mask, strict=True):
                assert row[out].max() <= row[~out].min() * (1 + 1e-5), layer.name
            weight[mask] = 0
    assert fingerprint(by_hand) == fingerprint(pruned)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_workers_agree_on_later_uses(criterion: str) -> None:
    def work(workers: Any) -> Any:
        model, anatomy, batches, loss = made("zamba2", True)
        model = copy.deepcopy(model)
        api.prune_to(
            model, anatomy, allocation_of(anatomy), batches, criterion=criterion, loss=loss, workers=workers
        )  # fmt: skip
        return fingerprint(model)

    assert together(2, work) == together(1, work) * 2
