"""Blocks that leave keys and values for others: skipped, run again or taken backward, they leave them but once."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers as hf
from families import shared
from families.matrix import calls_of, case, differences
from torch import Tensor, nn

from ecoflap.importance.measure import measure_importance
from ecoflap.model.anatomy import discover
from ecoflap.model.block_runner import BlockCall, TowerDriver
from ecoflap.model.carried import contents, left, packed, restore, unpacked
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import swapped
from ecoflap.model.recompute import reloading
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.model.trace import tensors_in

MODELS: dict[str, Callable[..., shared.Made]] = {"pi0": shared.pi0, "diffusion_gemma": shared.diffusion_gemma}


@cache
def made(name: str) -> tuple[nn.Module, Anatomy, Any, Any]:
    if name in MODELS:
        model, batches, loss = MODELS[name](padding=True)
        return model, discover(model, batches[0], run=loss), batches, loss
    found = case(name)
    return found.model, found.anatomy, found.padded, found.loss


@pytest.mark.parametrize("name", MODELS)
def test_replay_is_the_plain_forward_to_the_bit(name: str) -> None:
    model, anatomy, batches, loss = made(name)
    changed = 0
    with torch.no_grad(), Replay(model, anatomy.replayable) as replay:
        plain = loss(model, batches[0])
        assert torch.equal(loss(model, batches[0]), plain)
        computed = replay.counts.computed
        assert computed == len(anatomy.replayable)
        for block in anatomy.blocks:
            layer = next(layer for layer in block.layers if "k_proj" in layer.name)
            weight = model.get_parameter(layer.name)
            holders = {b for b in anatomy.replayable for path in layer.modules if path.startswith(b + ".")}
            with swapped(model, layer.modules, weight + 0.3 * torch.randn_like(weight)):
                with replay.forcing(*holders):
                    ours = loss(model, batches[0])
                replay.__exit__()
                theirs = loss(model, batches[0])
                replay.__enter__()
            assert torch.equal(ours, theirs), block.name
            changed += not torch.equal(ours, plain)
            loss(model, batches[0])  # recorded again
    assert changed == len(anatomy.blocks)


@pytest.mark.parametrize("name", MODELS)
def test_the_walk_gives_blocks_the_arguments_that_their_parent_passes(name: str) -> None:
    model, anatomy, batches, loss = made(name)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tower in anatomy.towers:
            driver = TowerDriver(model, tower, batches, loss)
            for index, block in enumerate(tower.blocks):
                ours: list[Any] = []
                driver.enter(index)

                def note(call: BlockCall, ours: list[Any] = ours) -> None:
                    ours.append(packed(call.args, call.kwargs))

                driver.observe(index, note)
                driver.observe(index, note)  # a second time: the first has left nothing
                theirs = [
                    call
                    for batch in batches
                    for call in calls_of(model, block.name, lambda batch=batch: loss(model, batch))
                ]
                assert differences(ours, [*theirs, *theirs]) is None, block.name
                for layer in block.layers:  # from here on the model is partly pruned
                    weight = stored_matrix(model, layer.name)
                    weight[weight.abs() < weight.abs().median()] = 0
                driver.run(index)


@pytest.mark.parametrize("name", [*MODELS, "gemma3n_text", "gemma4_text"])
def test_gradients_through_what_is_carried(name: str) -> None:
    model, anatomy, batches, loss = made(name)
    names = [layer.name for layer in anatomy.layers if not layer.stacked]
    weights = [model.get_parameter(one) for one in names]
    expected = torch.autograd.grad(loss(model, batches[0]), weights, materialize_grads=True, allow_unused=True)
    scores = measure_importance(model, batches[:1], anatomy=anatomy, loss=loss, importance="gradient-norm").scores
    for one, gradient in zip(names, expected, strict=True):
        norm = float(gradient.norm()) * math.sqrt(2 / math.pi)
        assert scores[one].score == pytest.approx(norm, rel=1e-4), one
    if any(layer.aliases for layer in anatomy.layers):
        return  # weights of several blocks are not made anew for each
    found: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert name not in found
        assert parameter.grad is not None
        found[name] = parameter.grad

    def loaded(path: str, last: bool) -> None:
        for layer in next(block for block in anatomy.blocks if block.name == path).layers:
            weight = model.get_parameter(layer.name)
            weight.register_post_accumulate_grad_hook(partial(keep, layer.name))

    with torch.enable_grad(), reloading(model, [block.name for block in anatomy.blocks], loaded):
        loss(model, batches[0]).backward()
    for one, gradient in zip(names, expected, strict=True):
        if gradient.any():
            torch.testing.assert_close(found[one], gradient, rtol=1e-4, atol=1e-6, msg=one)


def test_a_copy_of_the_arguments_goes_its_own_way() -> None:
    cache = hf.DynamicCache()
    cache.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), 0)
    entered = packed((cache,), {"shared": UserDict(a=1), "masks": {"full": torch.zeros(2)}})
    (copied,), keywords = unpacked(*entered)
    copied.update(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3), 0)
    keywords["shared"]["b"] = torch.ones(1)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (2, 6)
    before = contents((cache,), {"shared": UserDict(a=1), "masks": keywords["masks"]})
    assert differences(unpacked(*entered)[1]["shared"].data, {"a": 1}) is None
    behind = left(before, (copied,), keywords)
    assert behind.keys() == {0, "shared"}  # nobody wrote into the masks
    restore(behind, (cache,), {"shared": (other := UserDict(c=2))})
    assert cache.get_seq_length() == 6
    assert other.keys() == {"a", "b"}
    assert len(tensors_in(packed((cache,), {}))) == 2
