"""Padding by the masks that blocks get themselves: more padding changes no statistic, and real tokens are counted."""

from __future__ import annotations

from typing import Any

import picos
import pytest
import torch
from families import blip, dual
from torch import Tensor, nn
from torch.nn.functional import pad

from ecoflap.data.model_facts import token_masks
from ecoflap.data.objectives import on_device, resolve
from ecoflap.model.anatomy import discover
from ecoflap.model.block_runner import TowerDriver
from ecoflap.model.patching import cache_disabled
from ecoflap.statistics.gather import Gatherer
from ecoflap.statistics.inputs import InputNorm
from ecoflap.statistics.real_tokens import own_masks

FAMILIES = {family.name: family for family in (*blip.FAMILIES, *dual.FAMILIES)}
# Texts that end in padding, each with its mask; the columns of what is added.
TEXTS = ("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")
Found = dict[str, tuple[int, Tensor]]


def gathered(name: str, batch: dict[str, Any], include: tuple[str, ...] = ()) -> Found:
    """Tokens counted and input norms of every layer, block by block as the walk gathers them."""
    family = FAMILIES[name]
    model = family.build(seed=4)
    run = on_device(resolve(family.objective, model))
    found: Found = {}
    with torch.no_grad(), cache_disabled(model):
        for tower in discover(model, batch, run=run, include=include).towers:
            driver = TowerDriver(model, tower, [batch], run)
            sequence = "encoder" if tower.modality == "language" else None
            for index, block in enumerate(tower.blocks):
                driver.enter(index)
                masks = {0: token_masks(batch, False)}
                with Gatherer(model, block, InputNorm, masks, sequence, share=False) as gatherer:
                    driver.run(index, gatherer.before)
                for layer in block.layers:
                    statistics = gatherer.statistics(layer)
                    assert statistics is not None
                    found[layer.name] = (statistics.tokens, statistics.norm)
    return found


def longer(batch: dict[str, Any], keys: tuple[str, ...] = TEXTS, columns: int = 2) -> dict[str, Any]:
    return {key: pad(value, (0, columns)) if key in keys else value for key, value in batch.items()}


def assert_same(one: Found, other: Found) -> None:
    assert one.keys() == other.keys()
    for name, (tokens, norm) in one.items():
        assert other[name][0] == tokens, name
        torch.testing.assert_close(other[name][1], norm, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("name", "include"),
    [
        ("blip_retrieval", ()),  # its second call has other rows of texts than the batch, and three times as many
        ("blip2_retrieval", ("qformer",)),
        ("vilt_nlvr2", ()),  # text and picture in one sequence
        ("clip", ()),
        ("chinese_clip", ()),
    ],
)
def test_more_padding_changes_no_statistic(name: str, include: tuple[str, ...]) -> None:
    batch = FAMILIES[name].batches(n=3, batch_size=3, padding=True, seed=1)[0]
    assert not batch["attention_mask"].all()
    assert_same(gathered(name, batch, include), gathered(name, longer(batch), include))


@pytest.mark.parametrize("name", ["instructblip_t5", "instructblip_vicuna"])
def test_padding_of_the_q_formers_instruction(name: str) -> None:
    batch = FAMILIES[name].batches(n=3, batch_size=3, padding=True, seed=1)[0]
    only = ("qformer_input_ids", "qformer_attention_mask")
    batch["qformer_attention_mask"] = mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert mask.shape[1] == picos.QUERIES  # text and queries are told apart by name here, by their number below
    found, wider = gathered(name, batch, ("qformer",)), gathered(name, longer(batch, only), ("qformer",))
    assert_same(found, wider)
    words, queries = int(mask.sum()), 3 * picos.QUERIES
    for layer, (tokens, _) in found.items():
        if "qformer" not in layer:
            continue
        expected = queries + words
        if "_query" in layer or "crossattention" in layer:
            expected = queries
            if layer.endswith(("attention.key.weight", "attention.value.weight")):
                expected = 3 * (picos.PATCHES + 1)
        elif "attention" not in layer:  # the feed-forward of the text
            expected = words
        assert tokens == expected, layer


def test_patches_of_pictures_of_any_shape() -> None:
    batch = FAMILIES["siglip2"].batches(n=4, batch_size=4, padding=True, seed=1)[0]
    real = int(batch["pixel_attention_mask"].sum())
    assert real < batch["pixel_attention_mask"].numel()
    wide = {**longer(batch, ("pixel_attention_mask",)), "pixel_values": pad(batch["pixel_values"], (0, 0, 0, 2))}
    found = gathered("siglip2", batch)
    assert_same(found, gathered("siglip2", wide))
    assert {tokens for layer, (tokens, _) in found.items() if layer.startswith("vision")} == {real}


class Block(nn.Module):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        return hidden_states


def test_masks_that_say_which_tokens_are_real_and_masks_that_do_not() -> None:
    x, block = torch.randn(2, 4, 3), Block()
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(2, 1, 1, 4).masked_fill(~real[:, None, None], lowest)
    for mask in (additive, real[:, None, None], real[:, None, None].expand(2, 1, 4, 4), real.long()):
        assert torch.equal(own_masks(block, (x, mask), {}).of(x, "fc"), real)  # type: ignore[arg-type]
        found = own_masks(block, (x,), {"encoder_attention_mask": mask})
        assert found.tokens is None
        assert torch.equal(found.others, real)  # type: ignore[arg-type]
    causal = real[:, None, None] & torch.ones(4, 4).tril().bool()
    biased = additive + torch.randn(2, 2, 4, 4)
    for mask in (causal, biased, torch.ones(4, 4).tril(), None):
        assert own_masks(block, (x, mask), {}).of(x, "fc") is None
    assert torch.equal(own_masks(block, (x, additive), {}).of(x.view(8, 3), "fc"), real.view(8))  # type: ignore[arg-type]
    assert own_masks(block, (x, additive), {}).of(torch.randn(2, 5, 3), "fc") is None
