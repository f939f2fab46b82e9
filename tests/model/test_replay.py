"""Replay against plain forwards: the same loss to the bit, and no block computed that need not be."""

from __future__ import annotations

import pytest
import torch
from picos import FAMILIES
from torch import Tensor, nn
from torch.autograd import forward_ad

from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.patching import cache_disabled, differentiable_attention, has_tangent, swapped
from ecoflap.model.replay import Replay


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_probe_has_the_loss_of_a_plain_forward(name: str, padding: bool) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    loss = default_objective(model)
    with torch.no_grad(), cache_disabled(model):
        batches = family.batches(4, 2, padding=padding)
        anatomy = discover(model, batches[0], run=loss)
        for batch in batches:
            with Replay(model, anatomy.replayable) as replay:
                assert torch.equal(loss(model, batch), plain := loss(model, batch))
                for layer in anatomy.layers:
                    changed = model.get_parameter(layer.name) + 0.1 * torch.randn(1)
                    with swapped(model, layer.modules, changed), replay.forcing(layer.block):
                        replayed = loss(model, batch)
                with replay.forcing():
                    assert torch.equal(loss(model, batch), plain)
            with swapped(model, layer.modules, changed):
                assert torch.equal(loss(model, batch), replayed)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_probe_of_each_layer_against_the_plain_loop(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    loss = default_objective(model)
    batch = family.batches(2, 2, padding=True)[0]
    with torch.no_grad(), cache_disabled(model):
        anatomy = discover(model, batch, run=loss)
        changes = {layer.name: torch.randn_like(model.get_parameter(layer.name)) for layer in anatomy.layers}

        def losses(replay: Replay | None) -> list[float]:
            found = []
            for layer in anatomy.layers:
                with swapped(model, layer.modules, model.get_parameter(layer.name) + changes[layer.name]):
                    if replay is None:
                        found.append(float(loss(model, batch)))
                    else:
                        with replay.forcing(layer.block):
                            found.append(float(loss(model, batch)))
            return found

        plain = losses(None)
        with Replay(model, anatomy.replayable) as replay:
            loss(model, batch)
            assert losses(replay) == plain
    assert len(set(plain)) > len(plain) / 2  # the probes do change the loss


def test_a_probe_computes_its_block_and_those_after_it_only() -> None:
    model = FAMILIES["llama"].build().eval()
    loss = default_objective(model)
    batch = FAMILIES["llama"].batches(2, 2)[0]
    with torch.no_grad(), Replay(model, [f"model.layers.{i}" for i in range(3)]) as replay:
        loss(model, batch)
        assert (replay.counts.computed, replay.counts.replayed) == (3, 0)
        for index, expected in enumerate([3, 2, 1]):
            before = replay.counts.computed
            weight = model.model.layers[index].mlp.up_proj.weight + 0.5
            with swapped(model, [f"model.layers.{index}.mlp.up_proj"], weight), replay.forcing(f"model.layers.{index}"):
                loss(model, batch)
            assert replay.counts.computed - before == expected


def test_a_language_probe_leaves_the_vision_tower_and_the_bridge_alone() -> None:
    family = FAMILIES["blip2_t5"]
    model = family.build().eval()
    loss = default_objective(model)
    batch = family.batches(2, 2)[0]
    with torch.no_grad(), cache_disabled(model):
        anatomy = discover(model, batch, run=loss)
        last = anatomy.layers[-1]
        with Replay(model, anatomy.replayable) as replay:
            loss(model, batch)
            before = replay.counts.computed
            with swapped(model, last.modules, model.get_parameter(last.name) + 1), replay.forcing(last.block):
                loss(model, batch)
            assert replay.counts.computed - before == 1


class InPlace(nn.Module):
    """Blocks whose caller writes into what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x)
            out.add_(x)
            x = out
        return x.square().mean()


def test_an_output_that_is_written_into_is_not_replayed() -> None:
    model, x = InPlace(), torch.randn(2, 4)
    with torch.no_grad():
        plain = model(x)
        with Replay(model, ["blocks.0", "blocks.1", "blocks.2"]) as replay:
            assert torch.equal(model(x), plain)
            with replay.forcing("blocks.1"):
                assert torch.equal(model(x), plain)
            assert torch.equal(model(x), plain)


def test_another_batch_is_not_answered_from_memory() -> None:
    model, x, y = InPlace(), torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad(), Replay(model, ["blocks.0"]) as replay:
        model(x)
        with replay.forcing():
            inside = model(y)
    with torch.no_grad():
        assert torch.equal(inside, model(y))


def test_forwards_return_to_what_they_were_also_after_an_exception() -> None:
    model = InPlace()

    def own(x: Tensor) -> Tensor:
        return x

    model.blocks[1].forward = own  # as other tools do
    with pytest.raises(RuntimeError, match="stop"), Replay(model, ["blocks.0", "blocks.1"]):
        raise RuntimeError("stop")
    assert "forward" not in model.blocks[0].__dict__
    assert model.blocks[1].__dict__["forward"] is own


def test_gradients_pass_through() -> None:
    family = FAMILIES["llama"]
    model, batch = family.build().eval(), family.batches(2, 2)[0]
    with Replay(model, ["model.layers.0", "model.layers.1"]):
        with torch.no_grad():
            model(**batch)
        model(**batch).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    model.zero_grad()
    model(**batch).loss.backward()
    assert torch.equal(gradient, model.model.layers[0].mlp.up_proj.weight.grad)


@pytest.mark.parametrize("name", ["blip2_t5", "clip", "llama"])
def test_a_derivative_passes_through_every_block_after_the_probe_and_no_other_is_computed(name: str) -> None:
    """The values with a tangent are those remembered, to the bit: answering from memory would lose the derivative."""
    family = FAMILIES[name]
    model, batch = family.build().eval(), family.batches(2, 2)[0]
    loss = default_objective(model)
    with torch.no_grad(), cache_disabled(model), differentiable_attention():
        anatomy = discover(model, batch, run=loss)

        def derivative(layer: str, modules: tuple[str, ...]) -> float:
            with forward_ad.dual_level():
                weight = model.get_parameter(layer).detach()
                with swapped(model, modules, forward_ad.make_dual(weight, torch.ones_like(weight))):
                    tangent = forward_ad.unpack_dual(loss(model, batch)).tangent
                return 0.0 if tangent is None else float(tangent)

        blocks = [block for block in anatomy.blocks if block.layers]
        plain = {block.name: derivative(block.layers[0].name, block.layers[0].modules) for block in blocks}
        computed = []
        with Replay(model, anatomy.replayable) as replay:
            value = loss(model, batch)
            for block in blocks:
                before = replay.counts.computed
                with replay.forcing(block.name):
                    assert derivative(block.layers[0].name, block.layers[0].modules) == plain[block.name]
                computed.append(replay.counts.computed - before)
            before = replay.counts.computed
            assert torch.equal(loss(model, batch), value)  # and nothing with a tangent was remembered
            assert replay.counts.computed == before
    assert sum(map(bool, plain.values())) == len(plain)
    for tower in anatomy.towers:
        own = computed[: len(tower.blocks)]
        computed = computed[len(tower.blocks) :]
        assert own == sorted(own, reverse=True)
        assert len(set(own)) == len(own)


def test_a_call_with_a_tangent_is_neither_recorded_nor_answered() -> None:
    model, x = InPlace(), torch.randn(2, 4)
    block = model.blocks[0]
    with torch.no_grad(), Replay(model, ["blocks.0"]) as replay, forward_ad.dual_level():
        moving = forward_ad.make_dual(x, torch.ones_like(x))
        assert has_tangent(block(moving))  # while it records
        plain = block(x)
        assert not has_tangent(plain)
        assert has_tangent(block(moving))
        assert torch.equal(block(moving), plain)
        assert block(x) is plain
    assert (replay.counts.computed, replay.counts.replayed) == (4, 1)
