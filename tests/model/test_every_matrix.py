"""Each matrix of a model is prunable or named with its reason, once; lists that take turns are one stack."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from families.matrix import FAMILIES, case
from torch import nn

import ecoflap
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy


def told(anatomy: Anatomy) -> list[str]:
    names = list(dict.fromkeys(layer.parameter for layer in anatomy.layers))
    return names + [entry.name for entry in (*anatomy.unprunable, *anatomy.outside)]


def check_each_matrix_once(model: nn.Module, anatomy: Anatomy) -> None:
    names = told(anatomy)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        mentions = [one for one in names if name == one or name.startswith(one + ".")]
        aliases = [layer.name for layer in anatomy.layers if name in layer.aliases]
        assert len(mentions) + len(aliases) == 1, (name, mentions, aliases)
    stacked = Counter[str]()
    for layer in anatomy.layers:
        stacked.update({layer.parameter: layer.numel} if layer.stacked else {})
    assert all(model.get_parameter(name).numel() == count for name, count in stacked.items())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert all(e.numel == sizes[e.name] for e in (*anatomy.unprunable, *anatomy.outside) if e.name in sizes)
    assert all(entry.reason for entry in (*anatomy.unprunable, *anatomy.outside))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_matrix_of_a_family_is_prunable_or_named(name: str, traced: bool) -> None:
    found = case(name)
    check_each_matrix_once(found.model, found.anatomy if traced else discover(found.model))


def test_a_tower_that_no_sample_reached_is_named() -> None:
    found = case("llava")
    ids = torch.randint(10, 20, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    anatomy = discover(found.model, batch)
    check_each_matrix_once(found.model, anatomy)
    vision = {layer.name for layer in found.anatomy.layers if layer.modality == "vision"}
    reasons = {entry.name: entry.reason for entry in anatomy.unprunable}
    assert vision <= reasons.keys()
    assert {reasons[name] for name in vision} == {"not reached by the traced forward"}


def idefics(interval: int) -> tuple[nn.Module, dict[str, Any]]:
    """Gated cross-attention before every ``interval``-th layer, in a list of its own."""
    torch.manual_seed(0)
    config = transformers.IdeficsConfig(
        vocab_size=60, additional_vocab_size=0, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=interval, use_resampler=False, pad_token_id=1, bos_token_id=2,
        eos_token_id=3, max_position_embeddings=64, freeze_text_layers=False, freeze_vision_layers=False,
        alpha_initializer="ones", vision_config={"embed_dim": 16, "image_size": 16, "intermediate_size": 24,
                                                 "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip
    model = transformers.IdeficsForVisionText2Text(config).eval()
    ids = torch.randint(5, 60, (2, 8))
    return model, {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids,
        "pixel_values": torch.randn(2, 1, 3, 16, 16), "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long),
    }  # fmt: skip


def square(
    names: dict[nn.Module, str], squares: dict[str, torch.Tensor], module: nn.Module, args: Any, output: Any
) -> None:
    squares[names[module]] = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)


@pytest.mark.parametrize("interval", [1, 2])
def test_lists_that_take_turns_are_pruned_in_the_order_of_their_calls(interval: int) -> None:
    model, batch = idefics(interval)
    anatomy = discover(model, batch)
    check_each_matrix_once(model, anatomy)
    tower = anatomy.towers[-1]
    expected = []
    for layer in range(4):
        if layer % interval == 0:
            expected.append(f"model.gated_cross_attn_layers.{layer // interval}")
        expected.append(f"model.layers.{layer}")
    assert [block.name for block in tower.blocks] == expected
    by_hand = copy.deepcopy(model)
    result = ecoflap.prune(model, [batch], sparsity=0.5, importance="uniform", criterion="wanda")
    zeros = {layer.name: model.get_parameter(layer.name) == 0 for layer in anatomy.layers}
    # Wanda, block after block: all inputs of a block are those that the blocks before it, pruned, give.
    for block in anatomy.blocks:
        squares: dict[str, torch.Tensor] = {}
        names = {by_hand.get_submodule(layer.module): layer.name for layer in block.layers}
        note = partial(square, names, squares)
        hooks = [module.register_forward_hook(note) for module in names]
        with torch.no_grad():
            by_hand(**batch)
        for hook in hooks:
            hook.remove()
        for layer in block.layers:
            weight = by_hand.get_parameter(layer.name).data
            scores = weight.double().abs() * squares[layer.name].sqrt()
            for row, mask in enumerate(zeros[layer.name]):
                assert scores[row][mask].max() <= scores[row][~mask].min() * (1 + 1e-5)
            weight[zeros[layer.name]] = 0
    assert result.unreached == ()
