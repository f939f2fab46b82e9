"""Towers, blocks and layers found from the model itself, held against each config's own counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picos import FAMILIES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ecoflap.data.objectives import default_objective
from ecoflap.errors import AnatomyError
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy


def found(name: str, **options: Any) -> tuple[nn.Module, Anatomy]:
    family = FAMILIES[name]
    model = family.build()
    return model, discover(model, family.batches(2, 2)[0], run=default_objective(model), **options)


def layer_counts(name: str, config: Any) -> list[tuple[str, int]]:
    """(modality, blocks) of each tower as the configuration says, in the order of a forward."""
    if name == "blip2_t5":
        text = config.text_config
        return [("vision", config.vision_config.num_hidden_layers), ("language", text.num_layers),
                ("language", text.num_decoder_layers)]  # fmt: skip
    if name == "t5":
        return [("language", config.num_layers), ("language", config.num_decoder_layers)]
    if name in ("blip2_opt", "llava", "clip"):
        return [("vision", config.vision_config.num_hidden_layers), ("language", config.text_config.num_hidden_layers)]
    modality = "vision" if name == "vit" else "language"
    return [(modality, config.num_hidden_layers)]


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_are_those_of_the_config(name: str) -> None:
    model, anatomy = found(name)
    assert [(tower.modality, len(tower.blocks)) for tower in anatomy.towers] == layer_counts(name, model.config)
    assert anatomy.traced


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_exactly_the_linears_of_the_blocks(name: str) -> None:
    model, anatomy = found(name)
    expected = set()
    for block in anatomy.blocks:
        for path, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            if isinstance(module, nn.Linear | Conv1D):
                expected.add(f"{path}.weight")
    assert {layer.name for layer in anatomy.layers} == expected
    state = model.state_dict()
    for layer in anatomy.layers:
        stored = tuple(state[layer.name].shape)
        assert layer.shape == (stored[::-1] if layer.transposed else stored)
        assert layer.transposed == (name == "gpt2")
    assert anatomy.prunable_parameters == sum(state[name].numel() for name in expected)
    assert anatomy.total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_q_former_is_dense_until_it_is_included() -> None:
    _, without = found("blip2_t5")
    assert all("qformer" not in layer.name for layer in without.layers)
    named = [entry for entry in without.unprunable if "qformer" in entry.name]
    assert named
    assert all("--include" in entry.reason for entry in named)
    _, included = found("blip2_t5", include=["qformer.*"])
    assert [tower.modality for tower in included.towers] == ["vision", "bridge", "language", "language"]
    assert {e.name for e in named} == {layer.name for layer in included.layers} - {
        layer.name for layer in without.layers
    }


def test_exclude_wins_and_is_named() -> None:
    _, anatomy = found("llama", exclude=["*.mlp.*", "model.layers.0"])
    assert all("mlp" not in layer.name and "layers.0." not in layer.name for layer in anatomy.layers)
    assert {entry.reason for entry in anatomy.unprunable} == {"excluded"}
    assert len(anatomy.blocks) == 3  # an emptied block is still there to be walked through


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_selects_nothing_is_an_error(option: str) -> None:
    with pytest.raises(AnatomyError, match="nothing_like_this"):
        found("llama", **{option: ["nothing_like_this"]})


def test_towers_can_be_given() -> None:
    _, anatomy = found("blip2_t5", towers=["language_model.decoder.block"])
    assert [tower.name for tower in anatomy.towers] == ["language_model.decoder.block"]
    with pytest.raises(AnatomyError, match="towers="):
        found("llama", towers=["elsewhere"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Odd(nn.Module):
    """Towers defined in the reverse of their order, side-by-side experts, packed attention, shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.ModuleList(Block(4) for _ in range(3))
        self.first = nn.ModuleList(Block(4) for _ in range(2))
        self.side = nn.ModuleList(Block(4) for _ in range(3))
        self.never = nn.ModuleList(Block(4) for _ in range(2))
        self.embedding = nn.Embedding(4, 4)
        self.first[0].packed = nn.MultiheadAttention(4, 1, batch_first=True)
        self.first[0].experts = nn.Parameter(torch.randn(2, 4, 4))
        self.first[1].tied = nn.Linear(4, 4, bias=False)
        self.first[1].tied.weight = self.embedding.weight
        self.second[1].fc.weight = self.second[0].fc.weight
        self.second[2].spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        x = torch.stack([block(x) for block in self.side]).sum(0)
        for block in self.second:
            x = block(x)
        return x.square().mean()


def test_what_a_forward_shows_and_a_definition_does_not() -> None:
    model = Odd()
    anatomy = discover(model, {"x": torch.randn(2, 3, 4)})
    assert [tower.name for tower in anatomy.towers] == ["first", "second"]  # as called; "side" is no chain
    reasons = {entry.name: entry.reason for entry in anatomy.unprunable}
    assert reasons["first.0.packed.in_proj_weight"].startswith("not reached by the traced forward (Block never called")
    assert reasons["first.0.packed.out_proj.weight"].startswith("not reached by the traced forward (Block never called")
    assert reasons["first.0.experts"] == "3-D weight of Block"
    assert reasons["first.1.tied.weight"] == "shared with the embedding embedding.weight"
    assert reasons["second.2.spare.weight"].startswith("not reached by the traced forward (Block never called it")
    shared = anatomy.layer("second.0.fc.weight")
    assert shared.aliases == ("second.1.fc.weight",)
    assert shared.modules == ("second.0.fc", "second.1.fc")
    assert [layer.name for layer in anatomy.layers].count("second.1.fc.weight") == 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


class Alternating(nn.Module):
    """Two lists whose elements run in turns; with ``around`` the parent adds what went into those of the second."""

    def __init__(self, around: bool) -> None:
        super().__init__()
        self.around = around
        self.layers, self.between = (nn.ModuleList(Block(4) for _ in range(count)) for count in (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.layers):
            x = block(x)
            if number < 2:
                x = self.between[number](x) + (x if self.around else 0)
        return x.square().mean()


@pytest.mark.parametrize("around", [False, True])
def test_lists_that_take_turns_are_one_tower_unless_their_parent_adds_what_went_in(around: bool) -> None:
    anatomy = discover(Alternating(around), {"x": torch.randn(2, 3, 4)})
    names = [block.name for tower in anatomy.towers for block in tower.blocks]
    if around:  # no block could be skipped: what comes before it reaches what comes after it
        assert names == [f"layers.{number}" for number in range(3)]
        assert {entry.name for entry in anatomy.unprunable} == {"between.0.fc.weight", "between.1.fc.weight"}
    else:
        assert names == ["layers.0", "between.0", "layers.1", "between.1", "layers.2"]


def test_without_a_batch_the_order_is_that_of_definition() -> None:
    anatomy = discover(FAMILIES["blip2_t5"].build())
    assert not anatomy.traced
    assert [tower.modality for tower in anatomy.towers] == ["vision", "language", "language"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(AnatomyError, match="nothing to prune"):
        discover(nn.Linear(3, 3), {"input": torch.zeros(1, 3)})
