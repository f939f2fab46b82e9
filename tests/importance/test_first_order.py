"""First-order scores against gradients taken in the test."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from picos import FAMILIES
from torch import Tensor

from ecoflap import measure_importance
from ecoflap.data.objectives import default_objective
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.importance.scores import Importance
from ecoflap.model import patching
from ecoflap.model import recompute as recomputation
from ecoflap.model.patching import cache_disabled

FORMULAS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "gradient": lambda w, g: torch.stack(g).abs().mean(0).sum(),
    "weight-gradient": lambda w, g: (w.abs() * torch.stack(g).abs().mean(0)).sum(),
    "fisher": lambda w, g: (w.square() * torch.stack(g).square().mean(0)).sum(),
    "squared-weight-gradient": lambda w, g: (w.square() * torch.stack(g).abs().mean(0)).sum(),
    "norm": lambda w, g: math.sqrt(2 / math.pi) * torch.stack([one.norm() for one in g]).mean(),
}


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("name", ["blip2_t5", "clip", "gpt2"])
def test_each_variant_is_its_formula(name: str, variant: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build().eval(), family.batches(6, 2, padding=True)
    found = measure_importance(model, batches, "first-order", variant=variant)
    loss = default_objective(model)
    weights = {layer.name: model.get_parameter(layer.name) for layer in found.layers}
    gradients: dict[str, list[Tensor]] = {layer: [] for layer in weights}
    with cache_disabled(model):
        for batch in batches:
            for layer, gradient in zip(
                weights, torch.autograd.grad(loss(model, batch), list(weights.values())), strict=True
            ):
                gradients[layer].append(gradient)
    for layer, score in found.scores.items():
        expected = float(FORMULAS[variant](weights[layer].detach(), gradients[layer]))
        assert score.score == pytest.approx(expected, rel=1e-4)
        assert score.n == len(batches)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_recomputing_changes_no_bit(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(4, 2, padding=True)
    kept = measure_importance(model, batches, "first-order", variant="norm", recompute=False)
    again = measure_importance(model, batches, "first-order", variant="norm", recompute=True)
    assert again.scores == kept.scores
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_recomputing_keeps_only_the_inputs_of_blocks() -> None:
    """Bytes that autograd saves: grow by one input a block, not by a block's activations."""
    family = FAMILIES["llama"]
    saved: dict[bool, int] = {}
    for recompute in (False, True):
        count = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            measure_importance(family.build(), family.batches(2, 2), "first-order", recompute=recompute)
        saved[recompute] = count
    assert saved[True] < 0.5 * saved[False]


def test_recomputing_gives_freed_memory_back_every_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = 0

    def note() -> None:
        nonlocal trims
        trims += 1
        patching.trim()

    monkeypatch.setattr(recomputation, "trim", note)
    family = FAMILIES["blip2_t5"]  # 3 + 2 + 2 + 2 blocks
    measure_importance(family.build(), family.batches(2, 2), "gradient-norm")
    assert trims == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flags_and_gradients_of_the_user_survive(dtype: torch.dtype) -> None:
    family = FAMILIES["llama"]
    model, batches = family.build().to(dtype), family.batches(2, 2)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    flags = [p.requires_grad for p in parameters]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_importance(model, batches, "first-order")
    assert [p.requires_grad for p in parameters] == flags
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(p.grad is None for p in parameters[2:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_without_gradient_scores_zero() -> None:
    family = FAMILIES["llava"]
    scores = measure_importance(family.build(), family.batches(2, 2), "first-order").scores
    zero = {name for name, score in scores.items() if score.score == 0}
    assert zero == {name for name in scores if name.startswith("model.vision_tower.encoder.layers.2.")}


def test_gradient_norm_is_the_variant_norm() -> None:
    family = FAMILIES["blip2_t5"]
    model, batches = family.build(), family.batches(4, 2)
    norm = measure_importance(model, batches, "gradient-norm")
    assert norm.scores == measure_importance(model, batches, "first-order", variant="norm").scores
    assert norm.settings["recompute"] is True


class _Rounded(torch.autograd.Function):
    """Stands for an operator of a quantised model: it has a forward alone."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()


@pytest.mark.parametrize("rounded", [_Rounded.apply, lambda loss: loss.detach()])
def test_a_model_without_gradients_is_told_of_the_zeroth_order(rounded: Callable[[Tensor], Tensor]) -> None:
    family = FAMILIES["llama"]
    with pytest.raises(InvalidOption, match="zeroth-order"):
        measure_importance(
            family.build(), family.batches(2, 2), "gradient-norm", loss=lambda m, b: rounded(m(**b).loss)
        )


def test_unknown_variant() -> None:
    family = FAMILIES["llama"]
    with pytest.raises(UnknownName, match="did you mean 'fisher'"):
        measure_importance(family.build(), family.batches(2, 2), "first-order", variant="fischer")


def test_uniform_needs_no_forward_beyond_the_anatomy() -> None:
    family = FAMILIES["llama"]
    found = measure_importance(family.build(), family.batches(2, 2), "uniform")
    assert found.method == "uniform"
    assert {score.n for score in found.scores.values()} == {0}


def test_scores_survive_their_file() -> None:
    family = FAMILIES["clip"]
    found = measure_importance(family.build(), family.batches(4, 2), "first-order")
    again = Importance.from_json(found.to_json())
    assert again.scores == found.scores
    assert [(layer.name, layer.shape, layer.block, layer.tower) for layer in again.layers] == [
        (layer.name, layer.shape, layer.block, layer.tower) for layer in found.layers
    ]
