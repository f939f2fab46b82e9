"""Slices of stacked parameters as layers: what is found, their names, and computing with others in their place."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from families.stacked import EXPERTS, LAYOUTS, batches, build
from family_sweep.pico import shrunk
from torch import Tensor, nn
from transformers import LongcatFlashForCausalLM

import ecoflap
from ecoflap.data.objectives import default_objective
from ecoflap.errors import AnatomyError
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.gradient import visit_gradients
from ecoflap.importance.measure import measure_importance
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import parameter_of
from ecoflap.model.replay import Replay
from ecoflap.model.slices import experts_in_turn, matrix_in, slice_name, stored_matrix
from ecoflap.model.swapping import layers_swapped

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def test_names_say_which_slice_of_which_parameter() -> None:
    name = slice_name("model.layers.0.mlp.experts.gate_up_proj", 11)
    assert name == "model.layers.0.mlp.experts.gate_up_proj[11]"
    assert parameter_of(name) == "model.layers.0.mlp.experts.gate_up_proj"
    assert parameter_of("a.weight") == "a.weight"
    stacked = torch.randn(12, 3, 5)
    assert torch.equal(matrix_in(stacked, name), stacked[11])
    assert matrix_in(stacked, "a.weight") is stacked


@every_layout
def test_every_expert_is_a_layer_in_its_true_orientation(layout: str) -> None:
    model, data = build(layout), batches()
    anatomy = discover(model, data[0])
    slices = [layer for layer in anatomy.layers if layer.stacked]
    assert len(slices) == 2 * EXPERTS
    for layer in slices:
        stored = tuple(model.get_parameter(layer.parameter).shape[1:])
        assert layer.shape == (stored[::-1] if layer.transposed else stored)
        assert layer.transposed == (layout in ("GptOss", "Llama4Text"))
        assert layer.expert == f"{layer.module}{layer.name[layer.name.index('[') :]}"
        assert layer.mixture == layer.module
        width = model.config.hidden_size
        assert layer.shape[1 if "gate_up" in layer.name else 0] == width
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1)
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_bias"))
    assert anatomy.prunable_parameters >= 0.9 * (in_blocks - biases)
    if layout != "Llama4Text":  # whose experts don't tell without data how they lie
        assert discover(model).layers == anatomy.layers


def test_patterns_choose_single_experts_and_whole_parameters() -> None:
    model, data = build("Mixtral"), batches()
    path = "model.layers.0.mlp.experts"
    one = discover(model, data[0], exclude=[f"{path}.gate_up_proj[1]"])
    assert [layer.name for layer in one.layers if "gate_up" in layer.name] == [
        f"{path}.gate_up_proj[{number}]" for number in (0, 2, 3)
    ]
    dense = {entry.name: (entry.reason, entry.numel) for entry in one.unprunable}
    assert dense[f"{path}.gate_up_proj"] == (
        "excluded (1 of 4 experts)",
        model.get_parameter(f"{path}.gate_up_proj")[0].numel(),
    )
    whole = discover(model, data[0], exclude=[f"{path}.down_proj"])
    assert not [layer for layer in whole.layers if "down_proj" in layer.name]
    with pytest.raises(AnatomyError, match="selects no layer"):
        discover(model, data[0], exclude=[f"{path}.gate_up_proj[9]"])


@every_layout
@pytest.mark.parametrize("in_turn", [True, False])
@torch.no_grad()
def test_other_values_in_the_place_of_slices_are_as_if_they_were_written(layout: str, in_turn: bool) -> None:
    model, batch = build(layout), batches()[0]
    layers = [layer for layer in discover(model, batch).layers if layer.stacked]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = experts_in_turn(model) if in_turn else torch.no_grad()
    with implementation:
        for chosen in ([layers[1]], [layers[0], layers[-1]], layers):
            others = [(layer, torch.randn_like(stored_matrix(model, layer.name))) for layer in chosen]
            with layers_swapped(model, others):
                ours = model(**batch).logits
            for layer, other in others:
                stored_matrix(model, layer.name).copy_(other)
            theirs = model(**batch).logits
            model.load_state_dict(before)
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours, model(**batch).logits)


@every_layout
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_arrive_slice_by_slice_and_are_those_of_autograd(layout: str, recompute: bool) -> None:
    model, data = build(layout), batches()
    anatomy = discover(model, data[0])
    context = ProbeContext(model, anatomy, data, default_objective(model), seed=0)
    found: dict[str, Tensor] = {}

    def visit(name: str, weight: Tensor, gradient: Tensor) -> None:
        assert torch.equal(weight, stored_matrix(model, name))
        assert gradient.shape == weight.shape
        found[name] = gradient.clone()

    visit_gradients(context, 0, visit, recompute=recompute)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    for layer in anatomy.layers:
        model.get_parameter(layer.parameter).requires_grad_(True)
    with experts_in_turn(model):
        context.loss_tensor(0).backward()
    for layer in anatomy.layers:
        expected = matrix_in(model.get_parameter(layer.parameter).grad, layer.name)
        if layer.name not in found:  # no token was sent to it
            assert not expected.any()
        else:
            assert torch.equal(found[layer.name], expected), layer.name


@every_layout
@torch.no_grad()
def test_replay_with_a_changed_slice_is_the_plain_forward_to_the_bit(layout: str) -> None:
    model, batch = build(layout, num_hidden_layers=2) if layout == "Mixtral" else build(layout), batches()[0]
    anatomy = discover(model, batch)
    layer = next(layer for layer in anatomy.layers if layer.stacked)
    other = torch.randn_like(stored_matrix(model, layer.name))
    with layers_swapped(model, [(layer, other)]):
        plain = model(**batch).logits
    with Replay(model, anatomy.replayable) as replay:
        model(**batch)
        with replay.forcing(layer.block), layers_swapped(model, [(layer, other)]):
            assert torch.equal(model(**batch).logits, plain)
        assert replay.counts.computed < 2 * len(anatomy.replayable) + 1


@every_layout
@pytest.mark.parametrize("importance", ["gradient-norm", "forward-mode", "zeroth-order"])
def test_a_mixture_is_pruned_to_the_weight_with_every_measure(layout: str, importance: str) -> None:
    model, data = build(layout), batches()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {} if importance == "gradient-norm" else {"probe": "block"}
    result = ecoflap.prune(
        model, data, sparsity=0.5, importance=importance, importance_options=options, criterion="wanda"
    )
    for row in result.allocation.layers:
        assert int((stored_matrix(model, row.name) == 0).sum()) == row.zeros
    assert result.allocation.zeros == round(0.5 * result.anatomy.prunable_parameters)
    for name, value in model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], dense[name][kept])  # Wanda changes nothing but zeros


class Loop(nn.Module):
    """Experts of a family's own, outside of any interface; the last slice of ``up`` is that of one that passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        out = flat.clone()
        for number in range(3):
            inner = nn.functional.linear(flat[number::4], self.up[number]).relu()
            out = out.index_add(0, torch.arange(len(flat))[number::4], inner @ self.down[number])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.after = Loop(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.after(self.experts(x))
        return found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().mean()}


def test_modules_that_loop_over_slices_by_themselves_are_found_by_their_products() -> None:
    torch.manual_seed(0)
    model, data = Model(), [{"x": torch.randn(2, 10, 8)} for _ in range(2)]
    result = ecoflap.prune(model, data, sparsity=0.5, importance="gradient-norm", criterion="wanda")
    layers = {layer.name: layer for layer in result.anatomy.layers if layer.block == "blocks.0"}
    assert list(layers) == [f"blocks.0.experts.{leaf}[{number}]" for leaf in ("up", "down") for number in range(3)] + [
        "blocks.0.after.weight"
    ]
    assert layers["blocks.0.experts.up[1]"].shape == (6, 8)  # x @ up.T
    assert layers["blocks.0.experts.down[1]"].shape == (8, 6)  # inner @ down
    unused = {entry.name: (entry.reason, entry.numel) for entry in result.anatomy.outside}
    assert unused["blocks.0.experts.up"] == ("slices that no expert multiplies by (1 of 4)", 48)
    assert not result.anatomy.unprunable
    assert not result.unreached
    assert bool((model.blocks[0].experts.up[3] != 0).all())


class OneShared(Loop):
    """Two stacks, one of a single slice that all experts share."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(self.down.detach()[:1].clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(x[:, number::3] @ self.up[number].T) @ self.down[0] for number in range(3)], dim=1)


def test_slices_that_the_forward_multiplied_by_are_in_use_whatever_another_stack_holds() -> None:
    model = Model()
    for block in model.blocks:
        block.experts = OneShared()
    anatomy = discover(model, {"x": torch.randn(2, 12, 8)})
    assert [layer.name for layer in anatomy.blocks[0].layers[:4]] == [
        *(f"blocks.0.experts.up[{number}]" for number in range(3)), "blocks.0.experts.down[0]",
    ]  # fmt: skip
    assert [entry.name for entry in anatomy.outside] == ["blocks.0.experts.up", "blocks.1.experts.up"]


@pytest.mark.parametrize("importance", ["gradient-norm", "zeroth-order", "forward-mode"])
@pytest.mark.parametrize("layout", ["Mixtral", "GptOss", "Llama4Text"])
def test_scores_in_half_precision_are_those_of_the_same_weights_in_fp32(layout: str, importance: str) -> None:
    half = build(layout).bfloat16()
    whole, data = copy.deepcopy(half).float(), batches(1)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    found = [measure_importance(model, data, importance).scores for model in (half, whole)]
    assert found[0] == found[1]
    assert any(score.score > 0 for name, score in found[0].items() if name.endswith("]"))
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_a_router_that_also_chooses_experts_without_weights_stays_dense() -> None:
    with torch.device("meta"):
        model = LongcatFlashForCausalLM(shrunk("longcat_flash"))
    reasons = {entry.name: entry.reason for entry in discover(model).unprunable}
    assert reasons["model.layers.0.mlp.router.classifier.weight"].startswith("router of experts")


def test_the_experts_of_a_mixture_are_of_one_kind() -> None:
    anatomy = discover(build("Mixtral"), batches()[0])
    kinds = Counter(layer.kind for layer in anatomy.layers)
    assert kinds["mlp.experts.gate_up_proj"] == kinds["mlp.experts.down_proj"] == EXPERTS
    assert kinds["self_attn.q_proj.weight"] == 1
