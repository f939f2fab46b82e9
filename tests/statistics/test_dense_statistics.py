"""Statistics of the dense model against sums over the inputs that a plain forward shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.moe import mixture_of_modules
from picos import FAMILIES
from torch import Tensor, nn

from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_norms, dense_statistics
from ecoflap.statistics.inputs import InputGram


def plain_inputs(model: nn.Module, anatomy: Anatomy, batches: list[Any], masked: bool) -> dict[str, Tensor]:
    """(tokens, columns) fp64 of each layer's real tokens, from whole forwards with hooks."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in anatomy.layers}
    keep: list[Tensor | None] = [None]

    def hook(name: str) -> Any:
        def taken(_: nn.Module, args: Any) -> None:
            x = args[0].detach().double()
            seen[name].append(x[keep[0]] if keep[0] is not None else x.reshape(-1, x.shape[-1]))

        return taken

    hooks = [model.get_submodule(layer.module).register_forward_pre_hook(hook(layer.name)) for layer in anatomy.layers]
    with torch.no_grad(), cache_disabled(model):
        for batch in batches:
            keep[0] = batch["attention_mask"].bool() if masked else None
            model(**batch)
    for one in hooks:
        one.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip", "llava", "blip2_t5", "vit"])
@pytest.mark.parametrize("padding", [False, True])
def test_norms_are_those_of_a_plain_forward(name: str, padding: bool) -> None:
    if padding and name not in ("llama", "gpt2"):
        pytest.skip("one mask for all layers in text models alone; the others' padding is tested with the walk")
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(6, 2, padding=padding)
    run = default_objective(model)
    anatomy = discover(model, batches[0], run=run)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = dense_norms(model, anatomy, batches, run)
    expected = plain_inputs(model, anatomy, batches, padding)
    assert found.keys() == expected.keys()
    for layer, x in expected.items():
        torch.testing.assert_close(found[layer].norm.double(), x.norm(dim=0), rtol=1e-4, atol=1e-4)
        assert found[layer].tokens == len(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_grams_blocks_left_out_and_offloading() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(4, 2)
    run = default_objective(model)
    anatomy = discover(model, batches[0], run=run)
    plain = dense_norms(model, anatomy, batches, run)
    skip = {anatomy.blocks[0].name, anatomy.blocks[-1].name}
    seen = []
    for block, statistics in dense_statistics(model, anatomy, batches, run, kind="gram", skip=skip, offload=True):
        seen.append(block.name)
        assert list(statistics) == [layer.name for layer in block.layers]
        for name, got in statistics.items():
            assert isinstance(got, InputGram)
            torch.testing.assert_close(got.norm, plain[name].norm, rtol=1e-4, atol=1e-4)
    assert seen == [block.name for block in anatomy.blocks if block.name not in skip]


class FirstTwo(nn.Module):
    """A router that likes the first two experts best, whatever it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(len(x), 4)


def test_layers_without_tokens_are_none() -> None:
    model: Any = mixture_of_modules()
    model.model.layers[1].mlp.gate = FirstTwo()
    batches = FAMILIES["llama"].batches(2, 2)
    run = default_objective(model)
    anatomy = discover(model, batches[0], run=run)
    found = dense_norms(model, anatomy, batches, run)
    everything = {
        name: got
        for _, statistics in dense_statistics(model, anatomy, batches, run, tokens=TokenChoice(experts=0))
        for name, got in statistics.items()
    }
    assert everything.keys() == {layer.name for layer in anatomy.layers}
    assert {name for name, got in everything.items() if got is not None} == found.keys()
    unreached = {name for name, got in everything.items() if got is None}
    assert unreached == {name for name in everything if ".experts.2." in name or ".experts.3." in name}
    assert len(unreached) == 6


def test_the_model_is_left_as_it_was_when_the_pass_is_given_up() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build().train(), family.batches(2, 2)
    run = default_objective(model)
    anatomy = discover(model, batches[0], run=run)
    passing = dense_statistics(model, anatomy, batches, run)
    next(passing)
    assert not model.training
    passing.close()
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
