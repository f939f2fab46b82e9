"""Costs of parts of a pruned model: against plain forwards of really pruned copies, and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from searching import Subject, bits, quiet, random_masks, really_pruned, subject
from torch import Tensor, nn

from ecoflap.errors import InvalidOption
from ecoflap.model.parts import Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.replay import Replay
from ecoflap.search.costs import by_gradient, by_probes
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel

NAMES = ["llama", "gpt2", "t5", "blip2_t5", "clip", "shared_llama", "experts", "uncalled"]


def units_of(it: Subject) -> dict[str, list[Layer]]:
    """A block, what all blocks have, and some single layers."""
    layers = it.anatomy.layers
    return {
        "block": [layer for layer in layers if layer.block == it.anatomy.blocks[-1].name],
        "kind": [layer for layer in layers if layer.name.endswith(layers[0].name.split(".")[-2] + ".weight")],
        **{layer.name: [layer] for layer in layers[:: max(1, len(layers) // 4)]},
        "all": list(layers),
    }


@pytest.mark.parametrize("name", NAMES)
def test_probes_are_the_losses_of_copies_with_these_weights_put_back(name: str) -> None:
    it = subject(name)
    masks, units = random_masks(it.anatomy, kept=0.7), units_of(it)
    with quiet(it.model):
        divergence = Divergence(it.model, it.batches, it.loss, "loss")
        divergence.record()
        with MaskedModel(it.model, it.anatomy) as masked, Replay(it.model, it.anatomy.replayable) as replay:
            it.loss_of(it.model)  # something else is in memory
            masked.set(masks)
            found = by_probes(masked, replay, divergence, units)
        assert list(found) == list(units)

        def loss(kept: dict[Layer, Tensor]) -> float:
            copy = really_pruned(it.model, kept)
            return sum(float(it.loss_of(copy, index)) for index in range(len(it.batches))) / len(it.batches)

        whole = loss(masks)
        for unit, layers in units.items():
            rest = {layer: mask for layer, mask in masks.items() if layer not in layers}
            assert found[unit] == pytest.approx(whole - loss(rest), abs=1e-6)
    assert max(abs(value) for value in found.values()) > 1e-4


@pytest.mark.parametrize("metric", ["auto", "loss"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd_on_a_copy(name: str, metric: str) -> None:
    it = subject(name)
    masks = random_masks(it.anatomy, kept=0.7)
    it.model.get_parameter(it.anatomy.layers[0].name).requires_grad_(True)
    before, flags = bits(it.model), [parameter.requires_grad for parameter in it.model.parameters()]
    with cache_disabled(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence = Divergence(it.model, it.batches, it.loss, metric)
        divergence.record()
        masked.set(masks)
        with torch.no_grad():  # whatever mode the caller is in
            found = by_gradient(it.model, masked, divergence, it.anatomy.layers, it.anatomy.replayable)
        again = by_gradient(it.model, masked, divergence, it.anatomy.layers, it.anatomy.replayable)
    assert found == again
    assert bits(it.model) == before
    assert [parameter.requires_grad for parameter in it.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in it.model.parameters())

    copy = really_pruned(it.model, masks)
    with cache_disabled(it.model):
        reference = Divergence(it.model, it.batches, it.loss, metric)
        reference.record()
    reference._model = copy
    with cache_disabled(copy):
        expected = dict.fromkeys(found, 0.0)
        for index in range(len(it.batches)):
            copy.zero_grad()
            reference(index).backward()
            for layer, mask in masks.items():
                gradient = copy.get_parameter(layer.name).grad
                if gradient is not None:
                    removed = it.model.get_parameter(layer.name).detach() * ~(mask.t() if layer.transposed else mask)
                    expected[layer.name] -= float((gradient * removed).sum()) / len(it.batches)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


class Quadratic(nn.Module):
    """The loss is ½ Σ (W₁x + W₂x - target)²: quadratic in both weights together."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6, bias=False)) for _ in range(2))
        self.register_buffer("target", torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Any:
        both = self.blocks[0](x) + self.blocks[1](x)
        return (both - x @ self.target.t()).square().sum() / 2


def test_in_a_quadratic_model_the_parts_add_up_to_twice_the_loss() -> None:
    torch.manual_seed(1)
    model, x = Quadratic(), torch.randn(5, 6)
    model.target.copy_((model.blocks[0][0].weight + model.blocks[1][0].weight).detach())
    layers = [Layer(f"blocks.{i}.0.weight", f"blocks.{i}.0", f"blocks.{i}", "blocks", "", (6, 6)) for i in range(2)]

    class Parts:
        replayable = ("blocks.0", "blocks.1")

    Parts.layers = tuple(layers)
    divergence = Divergence(model, [{"x": x}], lambda m, b: m(**b), "loss")
    divergence.record()
    with MaskedModel(model, Parts) as masked:
        masked.set({layer: torch.rand(6, 6) < 0.5 for layer in layers})
        costs = by_gradient(model, masked, divergence, layers, Parts.replayable)
        assert sum(costs.values()) == pytest.approx(2 * divergence.value(0), rel=1e-4)
        assert divergence.value(0) > 0.1


class Stubborn(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError("no way back")


class NoWayBack(Quadratic):
    def forward(self, x: Tensor) -> Any:
        return Stubborn.apply(super().forward(x))


class Detached(Quadratic):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [NoWayBack, Detached])
def test_a_model_without_gradients_is_refused_in_one_line(kind: type[Quadratic]) -> None:
    model = kind()
    layer = Layer("blocks.0.0.weight", "blocks.0.0", "blocks.0", "blocks", "", (6, 6))

    class Parts:
        layers = (layer,)
        replayable = ("blocks.0", "blocks.1")

    divergence = Divergence(model, [{"x": torch.ones(2, 6)}], lambda m, b: m(**b), "loss")
    divergence.record()
    with MaskedModel(model, Parts) as masked, Replay(model, Parts.replayable) as replay:
        masked.set({layer: torch.rand(6, 6) < 0.5})
        with pytest.raises(InvalidOption, match=f"{kind.__name__} can't be differentiated.*by=probes") as refused:
            by_gradient(model, masked, divergence, [layer], Parts.replayable)
        assert len(str(refused.value).splitlines()) == 1
        with torch.no_grad():
            assert by_probes(masked, replay, divergence, {"one": [layer]})["one"] > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
