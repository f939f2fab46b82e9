"""Every family against every promise: what is found, replayed, scored, walked through and pruned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.matrix import FAMILIES, allocation_of, bits, calls_of, case, differences, gradients_of, some_layers
from torch import Tensor, nn

from ecoflap import api
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.projections import noise
from ecoflap.importance.scores import HALF_NORMAL_SPREAD, Estimate
from ecoflap.model.block_runner import BlockCall, TowerDriver
from ecoflap.model.carried import packed
from ecoflap.model.parts import Anatomy, parameter_of
from ecoflap.model.patching import cache_disabled
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.model.swapping import layers_swapped
from ecoflap.model.trace import tensors_in

CRITERIA = ("wanda", "sparsegpt", "magnitude")
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_towers_are_those_of_the_config(name: str) -> None:
    found = case(name)
    assert tuple((tower.modality, len(tower.blocks)) for tower in found.anatomy.towers) == found.family.towers
    assert all(block.layers for block in found.anatomy.blocks)


def _outputs(name: str, model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The loss and, where the model itself gives it, all else that comes out: logits, hidden states."""
    found = case(name)
    with torch.no_grad(), cache_disabled(model):
        tensors = [found.loss(model, batch)]
        if found.family.objective is None:
            extra = {} if "output_hidden_states" in batch else {"output_hidden_states": True}
            tensors += tensors_in(model(**batch, **extra))
    return tensors


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@every_family
def test_replay_is_the_plain_forward_to_the_bit(name: str, padding: bool) -> None:
    found = case(name)
    model, batch = found.model, (found.padded if padding else found.batches)[0]
    probes = []
    for number, block in enumerate(found.anatomy.blocks):
        layer = block.layers[number % len(block.layers)]
        weight = stored_matrix(model, layer.name)
        noise_of_block = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        probes.append((block, layer, weight + 0.3 * noise_of_block))
    plain = _outputs(name, model, batch)
    expected = []
    for _, layer, noisy in probes:
        with layers_swapped(model, [(layer, noisy)]):
            expected.append(_outputs(name, model, batch))
    assert sum(differences(plain, other) is not None for other in expected) > len(probes) / 2

    with Replay(model, found.anatomy.replayable) as replay:
        with torch.no_grad(), cache_disabled(model):
            found.loss(model, batch)
        assert differences(_outputs(name, model, batch), plain) is None
        for (block, layer, noisy), outputs in zip(probes, expected, strict=True):
            with layers_swapped(model, [(layer, noisy)]), replay.forcing(block.name):
                assert differences(_outputs(name, model, batch), outputs) is None, layer.name


class _Kept:
    """Remembers the signed estimates."""

    def __init__(self) -> None:
        self.kept: list[Estimate] = []

    def estimates(self) -> tuple[Estimate, ...]:
        return ()

    def append(self, estimate: Estimate) -> None:
        self.kept.append(estimate)


@every_family
def test_scores_are_gradient_norms_and_leave_no_trace(name: str) -> None:
    found, draws, epsilon = case(name), 8, 3e-4
    model, batch, layers = found.fresh(), found.padded[0], some_layers(found.anatomy)
    names = [layer.name for layer in layers]
    anatomy = _only(found.anatomy, set(names))
    before, journal = bits(model), _Kept()
    scores = measure_importance(
        model, [batch], anatomy=anatomy, loss=found.loss, draws=draws, epsilon=epsilon, journal=journal
    ).scores
    assert bits(model) == before

    with cache_disabled(model), torch.enable_grad():
        loss = found.loss(model, batch)
        gradients = gradients_of(loss, model, names)
    rounding = 8 * torch.finfo(torch.float32).eps * abs(float(loss.detach())) / (2 * epsilon)
    relative = []
    for layer_name, gradient in zip(names, gradients, strict=True):
        score = scores[layer_name]
        if gradient is None or not gradient.any():
            assert score.score == 0, layer_name
            continue
        # Each estimate is the gradient's projection on its own noise: sharp, whatever the number of draws.
        exact = [
            float((gradient * noise(gradient.shape, gradient.device, seed=0, layer=layer_name, batch=0, draw=d)).sum())
            for d in range(draws)
        ]
        ours = [e.value for e in journal.kept if e.layer == layer_name]
        error = math.sqrt(sum((a - b) ** 2 for a, b in zip(ours, exact, strict=True)) / draws)
        expected = math.sqrt(2 / math.pi) * float(gradient.norm())
        assert error < 0.15 * expected + rounding, layer_name  # kinks of a ReLU take up to 11 %
        # And so their mean size estimates √(2/π)·‖∇L‖ within the standard error that is stated.
        assert score.n == draws
        assert abs(score.score - expected) < 5 * max(score.stderr, HALF_NORMAL_SPREAD * expected / math.sqrt(draws))
        relative.append(score.score / expected - 1)
    assert relative
    spread = HALF_NORMAL_SPREAD / math.sqrt(draws * len(relative))
    assert abs(sum(relative) / len(relative)) < 5 * spread + rounding


def _only(anatomy: Anatomy, names: set[str]) -> Anatomy:
    """The anatomy with these layers alone."""
    towers = tuple(
        replace(
            tower,
            blocks=tuple(
                replace(block, layers=tuple(layer for layer in block.layers if layer.name in names))
                for block in tower.blocks
            ),
        )
        for tower in anatomy.towers
    )
    return replace(anatomy, towers=towers)


@every_family
def test_the_walk_gives_blocks_the_arguments_that_their_parent_passes(name: str) -> None:
    found = case(name)
    model = found.fresh()
    with torch.no_grad(), cache_disabled(model):
        for tower in found.anatomy.towers:
            driver = TowerDriver(model, tower, found.padded, found.loss)
            for index, block in enumerate(tower.blocks):
                ours: list[BlockCall] = []
                driver.enter(index)
                driver.run(
                    index, lambda call, ours=ours: ours.append(BlockCall(call.batch, *packed(call.args, call.kwargs)))
                )
                calls = [
                    (number, *call)
                    for number, batch in enumerate(found.padded)
                    for call in calls_of(model, block.name, lambda batch=batch: found.loss(model, batch))
                ]
                assert len(ours) == len(calls)
                for mine, (number, args, kwargs) in zip(ours, calls, strict=True):
                    assert mine.batch == number
                    assert differences((mine.args, mine.kwargs), (args, kwargs)) is None, block.name
                for layer in block.layers:  # from here on the model is partly pruned
                    weight = stored_matrix(model, layer.name)
                    weight[weight.abs() < weight.abs().median()] = 0
                driver.run(index)


def _pruned(name: str, criterion: str, **options: Any) -> tuple[nn.Module, Any]:
    found = case(name)
    model = found.fresh()
    pattern = options.get("pattern", "unstructured")
    allocation = allocation_of(found.anatomy, **options)
    achieved, unreached = api.prune_to(
        model, found.anatomy, allocation, found.padded, criterion=criterion, pattern=pattern, loss=found.loss
    )
    assert all(found.anatomy.layer(layer).expert for layer in unreached)  # a router may pass an expert over
    return model, achieved


@pytest.mark.parametrize("criterion", CRITERIA)
@every_family
def test_sparsity_is_the_one_asked_for_to_the_weight(name: str, criterion: str) -> None:
    anatomy = case(name).anatomy
    model, achieved = _pruned(name, criterion)
    zeros = {layer.name: int((stored_matrix(model, layer.name) == 0).sum()) for layer in anatomy.layers}
    assert sum(zeros.values()) == round(0.5 * anatomy.prunable_parameters)
    assert zeros == {row.name: row.zeros for row in achieved.layers}
    others = {parameter_of(other) for layer in anatomy.layers for other in (layer.name, *layer.aliases)}
    before = case(name).model.state_dict()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items() if key not in others)


@pytest.mark.parametrize("criterion", CRITERIA)
@every_family
def test_n_of_m_holds_in_every_group(name: str, criterion: str) -> None:
    model, _ = _pruned(name, criterion, uniform=True, pattern="2:4")
    for layer in case(name).anatomy.layers:
        weight = stored_matrix(model, layer.name)
        groups = (weight.T if layer.transposed else weight).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all(), layer.name


@every_family
def test_another_allocation_gives_other_masks(name: str) -> None:
    anatomy = case(name).anatomy
    uneven, even = (_pruned(name, "wanda", uniform=uniform)[0] for uniform in (False, True))
    masks = [[stored_matrix(model, layer.name) == 0 for layer in anatomy.layers] for model in (uneven, even)]
    changed = sum(not torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert changed > len(anatomy.layers) / 2
    assert sum(int(m.sum()) for m in masks[0]) == sum(int(m.sum()) for m in masks[1])


def test_the_documentation_lists_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
