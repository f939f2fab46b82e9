"""A masked model against one whose weights are really zero: forwards, derivatives, and no trace left."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import bits, quiet, random_masks, really_pruned, subject

from ecoflap.model.patching import cache_disabled
from ecoflap.model.recompute import recomputing
from ecoflap.model.replay import Replay
from ecoflap.search.masked_model import MaskedModel, PackedMask

NAMES = ["blip2_t5", "llava", "clip", "vit", "t5", "llama", "gpt2", "bert", "shared_llama", "experts", "uncalled"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 999), st.booleans())
def test_a_mask_is_packed_and_unpacked(shape: list[int], seed: int, turned: bool) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask.transpose(0, -1) if turned else mask  # not contiguous
    packed = PackedMask(mask)
    assert torch.equal(packed.unpacked(), mask)
    assert packed.unpacked().dtype == torch.bool
    assert packed._bits.numel() == math.ceil(mask.numel() / 8)
    assert packed._bits.element_size() == 1


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["packed", "whole"])
def _kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks as bits, and masked weights."""
    monkeypatch.setattr("ecoflap.search.masked_model._READY", request.param)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_a_model_with_zeros(name: str) -> None:
    it = subject(name)
    before, masks = bits(it.model), random_masks(it.anatomy)
    pruned = really_pruned(it.model, masks)
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        dense = it.loss_of(it.model)
        masked.set(masks)
        for index in range(len(it.batches)):
            assert torch.equal(it.loss_of(it.model, index), it.loss_of(pruned, index))
        assert not torch.equal(it.loss_of(it.model), dense)
        assert bits(it.model) == before
        masked.clear()
        assert torch.equal(it.loss_of(it.model), dense)
    assert bits(it.model) == before
    assert torch.equal(it.loss_of(it.model), dense)


@pytest.mark.parametrize("name", ["llama", "gpt2", "shared_llama", "uncalled"])
def test_every_single_layer_is_masked_where_it_runs(name: str) -> None:
    it = subject(name)
    masks = random_masks(it.anatomy)
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        dense = it.loss_of(it.model)
        for layer in it.anatomy.layers:
            masked.set({layer: masks[layer]})
            assert torch.equal(it.loss_of(it.model), it.loss_of(really_pruned(it.model, {layer: masks[layer]})))
            assert not torch.equal(it.loss_of(it.model), dense)
            masked.clear()


def test_later_masks_leave_other_layers_alone_and_dense_ones_run_dense() -> None:
    it = subject("shared_llama")
    one, other = random_masks(it.anatomy, 1), random_masks(it.anatomy, 2)
    first, second, *_ = it.anatomy.layers
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        masked.set(one)
        masked.set({first: other[first]})
        assert torch.equal(it.loss_of(it.model), it.loss_of(really_pruned(it.model, one | {first: other[first]})))
        masked.set(one)
        whole = it.loss_of(it.model)
        for layer in it.anatomy.layers:
            rest = really_pruned(it.model, {key: mask for key, mask in one.items() if key is not layer})
            with masked.dense([layer.name]):
                assert torch.equal(it.loss_of(it.model), it.loss_of(rest))
        with masked.dense([first.name]), masked.dense([second.name]):  # both
            rest = really_pruned(it.model, {key: mask for key, mask in one.items() if key not in (first, second)})
            assert torch.equal(it.loss_of(it.model), it.loss_of(rest))
        assert torch.equal(it.loss_of(it.model), whole)


def test_blocks_of_a_layer() -> None:
    it = subject("shared_llama")
    masked = MaskedModel(it.model, it.anatomy)
    assert masked.blocks_of("model.layers.0.mlp.up_proj.weight") == ("model.layers.0", "model.layers.2")
    assert masked.blocks_of("model.layers.1.mlp.up_proj.weight") == ("model.layers.1",)
    for layer in subject("blip2_t5").anatomy.layers:
        assert MaskedModel(subject("blip2_t5").model, subject("blip2_t5").anatomy).blocks_of(layer.name) == (
            layer.block,
        )


@pytest.mark.parametrize("name", ["gpt2", "shared_llama", "uncalled"])
def test_nothing_is_left_after_an_exception(name: str) -> None:
    it = subject(name)
    before, dense = bits(it.model), it.loss_of(it.model)
    parameters = {key: id(value) for key, value in it.model.named_parameters(remove_duplicate=False)}
    inner = it.model.get_submodule(it.anatomy.layers[-1].block)

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with MaskedModel(it.model, it.anatomy) as masked:
            masked.set(random_masks(it.anatomy))
            with masked.removed_part({layer.name: torch.ones(()) for layer in it.anatomy.layers}):
                it.loss_of(it.model)

    handles = [module.register_forward_pre_hook(strike) for module in inner.modules() if module is not inner]
    with pytest.raises(KeyboardInterrupt):
        run()
    for handle in handles:
        handle.remove()
    assert bits(it.model) == before
    assert {key: id(value) for key, value in it.model.named_parameters(remove_duplicate=False)} == parameters
    assert all("forward" not in module.__dict__ for module in it.model.modules())
    assert torch.equal(it.loss_of(it.model), dense)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip", "shared_llama", "experts", "uncalled"])
def test_the_derivative_of_the_removed_part(name: str, recompute: bool) -> None:
    """By autograd on a copy with real zeros: minus the gradient there, times the weights that went."""
    it = subject(name)
    masks = random_masks(it.anatomy)
    pruned = really_pruned(it.model, masks)
    with cache_disabled(pruned):
        plain = it.loss(pruned, it.batches[0])
        plain.backward()
    expected = {}
    for layer, mask in masks.items():
        gradient = pruned.get_parameter(layer.name).grad
        dense = it.model.get_parameter(layer.name).detach()
        removed = dense * ~(mask.t() if layer.transposed else mask)
        expected[layer.name] = 0.0 if gradient is None else -float((gradient * removed).sum())
    parts = {layer.name: torch.ones((), requires_grad=True) for layer in it.anatomy.layers}
    blocks = it.anatomy.replayable if recompute else ()
    with cache_disabled(it.model), MaskedModel(it.model, it.anatomy) as masked, recomputing(it.model, blocks):
        masked.set(masks)
        with masked.removed_part(parts):
            loss = it.loss(it.model, it.batches[0])
            assert torch.equal(loss, plain)
            found = torch.autograd.grad(loss, list(parts.values()), allow_unused=True)
        assert torch.equal(it.loss_of(it.model), plain.detach())  # outside, too
    got = {name: 0.0 if part is None else float(part) for name, part in zip(parts, found, strict=True)}
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert sum(value != 0 for value in expected.values()) > len(expected) / 2


@pytest.mark.parametrize("name", NAMES)
def test_replay_gives_the_same_losses(name: str) -> None:
    """Either one around the other; where a layer turns dense, the blocks that hold it are computed again."""
    it = subject(name)
    masks = random_masks(it.anatomy)
    probed = it.anatomy.layers[:: max(1, len(it.anatomy.layers) // 6)]
    losses = {}
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        masked.set(masks)
        losses[None] = it.loss_of(it.model)
        for layer in probed:
            with masked.dense([layer.name]):
                losses[layer.name] = it.loss_of(it.model)
        with Replay(it.model, it.anatomy.replayable) as replay:
            assert torch.equal(it.loss_of(it.model), losses[None])
            for layer in probed:
                with masked.dense([layer.name]), replay.forcing(*masked.blocks_of(layer.name)):
                    assert torch.equal(it.loss_of(it.model), losses[layer.name])
            with replay.forcing():
                assert torch.equal(it.loss_of(it.model), losses[None])
            assert replay.counts.replayed
