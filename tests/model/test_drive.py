"""The driver gives each block what the parent's own forward gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picos import FAMILIES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.block_runner import BlockCall, TowerDriver
from ecoflap.model.patching import cache_disabled


def true_arguments(model: nn.Module, block: str, batches: list[Any], loss: Any) -> list[Any]:
    """Arguments of the block in plain forwards of the whole model."""
    taken: list[Any] = []
    hook = model.get_submodule(block).register_forward_pre_hook(
        lambda module, args, kwargs: taken.append((args, dict(kwargs))), with_kwargs=True
    )
    for batch in batches:
        loss(model, batch)
    hook.remove()
    return taken


def assert_same(found: Any, expected: Any) -> None:
    ours, our_spec = pytree.tree_flatten(found)
    theirs, their_spec = pytree.tree_flatten(expected)
    assert our_spec == their_spec
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("offload", [False, True, "disk"])
@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_are_those_of_a_plain_forward_of_the_model_pruned_so_far(name: str, offload: bool | str) -> None:
    """T5's position biases, CLIP's causal mask, rotary positions, encoder outputs: all that the parent passes."""
    family = FAMILIES[name]
    model = family.build().eval()
    loss = default_objective(model)
    batches = family.batches(4, 2, padding=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), cache_disabled(model):
        anatomy = discover(model, batches[0], run=loss)
        for tower in anatomy.towers:
            driver = TowerDriver(model, tower, batches, loss, offload=offload)
            for index, block in enumerate(tower.blocks):
                assert driver.enter(index) == len(batches)
                seen: list[BlockCall] = []
                driver.run(index, seen.append)
                expected = true_arguments(model, block.name, batches, loss)
                assert [call.batch for call in seen] == list(range(len(batches)))
                for call, arguments in zip(seen, expected, strict=True):
                    assert_same((call.args, call.kwargs), arguments)
                for layer in block.layers:  # what follows must see this block as it is now
                    weight = model.get_parameter(layer.name)
                    weight.mul_(torch.rand(weight.shape, generator=generator) > 0.3)
                driver.run(index, last=True)


class Twice(nn.Module):
    """One tower that runs twice in a forward, as for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Module()
        self.tower.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.tower.forward = self._tower

    def _tower(self, x: Tensor) -> Tensor:
        for block in self.tower.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.tower(x) - self.tower(y + self.tower(x).mean())).square().mean()


def test_a_tower_that_runs_several_times_gives_all_its_calls() -> None:
    model = Twice()
    batches = [{"x": torch.randn(2, 4), "y": torch.randn(2, 4)} for _ in range(2)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(**batch)

    with torch.no_grad():
        (tower,) = discover(model, batches[0]).towers
        assert tower.calls == 3
        driver = TowerDriver(model, tower, batches, loss)
        for index, block in enumerate(tower.blocks):
            assert driver.enter(index) == 6
            seen: list[BlockCall] = []
            driver.run(index, seen.append)
            for call, arguments in zip(seen, true_arguments(model, block.name, batches, loss), strict=True):
                assert_same((call.args, call.kwargs), arguments)
