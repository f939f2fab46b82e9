"""Layers in groups and the dense model beside the pruned one, against plain forwards of two whole models."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families.moe import EXPERTS, mixture_of_modules
from picos import FAMILIES
from pruning.test_walk import Journal, anatomy_of, inputs_of, pruned, some_allocation
from torch import Tensor, nn

from ecoflap import api
from ecoflap.allocation import Allocation
from ecoflap.allocation.patterns import Unstructured
from ecoflap.data.model_facts import is_encoder_decoder, token_masks
from ecoflap.data.objectives import default_objective
from ecoflap.model.block_runner import TowerDriver
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.resumed import ResumedCalls
from ecoflap.model.trace import evaluating
from ecoflap.pruning import sequential
from ecoflap.pruning.admm import ADMM
from ecoflap.pruning.sequential import layer_groups
from ecoflap.statistics.pair import InputPair
from ecoflap.support.workers import ALONE


def groups_of(model: nn.Module, anatomy: Anatomy, batch: Any) -> dict[str, list[list[str]]]:
    """The groups of each tower's last block, as the last parts of the layers' modules."""
    found = {}
    with evaluating(model), cache_disabled(model):
        for tower in anatomy.towers:
            driver = TowerDriver(model, tower, [batch], default_objective(model))
            last = len(tower.blocks) - 1
            for index in range(last):
                driver.enter(index)
                driver.run(index, last=True)
            driver.enter(last)
            groups = layer_groups(model, driver, last, tower.blocks[last], ALONE)
            assert sorted(layer.name for group in groups for layer in group.layers) == sorted(
                layer.name for layer in tower.blocks[last].layers
            )
            found[tower.modality] = [[layer.module.rpartition(".")[2] for layer in group.layers] for group in groups]
    return found


def test_groups_read_one_input_in_the_order_of_a_forward() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2, 2)[0]
    groups = groups_of(model, anatomy_of(model, batch), batch)
    assert groups["language"] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_what_experts_read_goes_together() -> None:
    model, batch = mixture_of_modules(), FAMILIES["llama"].batches(2, 2)[0]
    groups = groups_of(model, anatomy_of(model, batch), batch)["language"]
    assert groups[:2] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert groups[2] == ["w1", "w3"] * EXPERTS
    assert groups[3] == ["w2"] * EXPERTS


def masks_for(layer: Layer, anatomy: Anatomy, batch: Any, seq2seq: bool) -> Tensor | None:
    language = [tower.name for tower in anatomy.towers if tower.modality == "language"]
    if layer.tower not in language:
        return None
    masks = token_masks(batch, seq2seq)
    in_decoder = seq2seq and layer.tower == language[-1]
    crosses = "EncDecAttention.k" in layer.name or "EncDecAttention.v" in layer.name
    return masks.decoder if in_decoder and not crosses else masks.encoder


def slow_walk(model: nn.Module, anatomy: Anatomy, allocation: Allocation, batches: list[Any], rule: ADMM) -> None:
    """Group after group: plain forwards of the dense model and of the model as it is, statistics, the criterion."""
    dense, loss, seq2seq = copy.deepcopy(model), default_objective(model), is_encoder_decoder(model)
    for block in anatomy.blocks:
        first = inputs_of(model, block.layers, lambda: loss(model, batches[0]))
        again = [replace(layer, module=path) for layer in block.layers for path in layer.modules[1:]]
        later = [inputs_of(model, again, lambda batch=batch: loss(model, batch)) for batch in batches]
        order: list[tuple[Tensor, list[Layer]]] = []
        names = [name for name in first if name in {layer.name for layer in block.layers}]
        of_name = {layer.name: layer for layer in block.layers}
        for name in names:
            group = next((group for x, group in order if x is first[name]), None)
            if group is None:
                order.append((first[name], [of_name[name]]))
            else:
                group.append(of_name[name])
        for _, group in order:
            pair = InputPair(group[0].shape[1])
            for number, batch in enumerate(batches):
                pair.begin(number)
                now = inputs_of(model, block.layers, lambda batch=batch: loss(model, batch))[group[0].name]
                before = inputs_of(dense, block.layers, lambda batch=batch: loss(dense, batch))[group[0].name]
                pair.update(now, masks_for(group[0], anatomy, batch, seq2seq), before)
            pair.close()
            if group[0].aliases:  # of later uses, the model as it is when the block's turn comes is all that is known
                assert len(group) == 1
                others = InputPair(group[0].shape[1])
                for number, (batch, found) in enumerate(zip(batches, later, strict=True)):
                    others.begin(number)
                    others.update(found[group[0].name], masks_for(group[0], anatomy, batch, seq2seq))
                others.close()
                pair = pair.with_others([others])
            for layer in group:
                weight = model.get_parameter(layer.name)
                stored = weight.T if layer.transposed else weight
                got = rule(stored, pair, allocation[layer.name].zeros, Unstructured("matrix")).weight
                weight.copy_(got.T if layer.transposed else got)


@pytest.mark.parametrize("name", ["t5", "llama", "blip2_opt", "bert", "clip", "llava", "gpt2"])
def test_admm_is_that_of_plain_forwards_of_two_models(name: str) -> None:
    batches = FAMILIES[name].batches(6, 2, padding=True)
    model, anatomy, (allocation, unreached) = pruned(name, batches, "admm", tokens="all")
    slow = FAMILIES[name].build().eval()
    with torch.no_grad(), cache_disabled(slow):
        slow_walk(slow, anatomy, allocation, batches, ADMM())
    for layer in anatomy.layers:
        torch.testing.assert_close(
            model.get_parameter(layer.name), slow.get_parameter(layer.name), rtol=1e-3, atol=1e-5, msg=layer.name
        )
    assert not unreached


@pytest.mark.parametrize("options", [{}, {"targets": "own"}, {"order": "block"}])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_activations_change_nothing(where: str, options: dict[str, str]) -> None:
    batches = FAMILIES["t5"].batches(4, 2, padding=True)
    kept, anatomy, _ = pruned("t5", batches, "admm", criterion_options=options)
    offloaded, _, _ = pruned("t5", batches, "admm", criterion_options=options, offload_activations=where)
    for layer in anatomy.layers:
        assert torch.equal(kept.get_parameter(layer.name), offloaded.get_parameter(layer.name))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_later_layers_of_a_block_see_the_earlier_ones_pruned(criterion: str) -> None:
    batches = FAMILIES["llama"].batches(4, 2)
    usual, anatomy, _ = pruned("llama", batches, criterion)
    turned, _, _ = pruned("llama", batches, criterion, criterion_options={"order": "sequential"})
    first = anatomy.blocks[0].layers
    same = {layer.module.rpartition(".")[2] for layer in first
            if torch.equal(usual.get_parameter(layer.name), turned.get_parameter(layer.name))}  # fmt: skip
    assert same >= {"q_proj", "k_proj", "v_proj"}
    assert "down_proj" not in same


def test_a_damaged_block_in_the_middle_is_pruned_again_to_the_same_bits() -> None:
    batches = FAMILIES["blip2_t5"].batches(4, 2, padding=True)
    journal = Journal()
    whole, anatomy, _ = pruned("blip2_t5", batches, "admm", journal=journal)
    for block in (anatomy.towers[0].blocks[0], anatomy.towers[-1].blocks[1]):
        del journal.blocks[block.name]
    again, _, _ = pruned("blip2_t5", batches, "admm", journal=journal)
    for layer in anatomy.layers:
        assert torch.equal(again.get_parameter(layer.name), whole.get_parameter(layer.name)), layer.name


def test_a_weight_that_blocks_share_is_dense_in_the_dense_model() -> None:
    batches = FAMILIES["llama"].batches(4, 2)
    model = FAMILIES["llama"].build().eval()
    one, two = (block.self_attn.o_proj for block in model.model.layers[:2])  # type: ignore[union-attr, index]
    two.weight = one.weight
    anatomy = anatomy_of(model, batches[0])
    assert any(layer.aliases for layer in anatomy.layers)
    allocation, slow = some_allocation(anatomy), copy.deepcopy(model)
    api.prune_to(model, anatomy, allocation, batches, criterion="admm")
    with torch.no_grad(), cache_disabled(slow):
        slow_walk(slow, anatomy, allocation, batches, ADMM())
    for layer in anatomy.layers:
        torch.testing.assert_close(
            model.get_parameter(layer.name), slow.get_parameter(layer.name), rtol=1e-3, atol=1e-5, msg=layer.name
        )


def test_nothing_is_gained_where_the_models_are_the_same() -> None:
    """Before anything is pruned, dense inputs and own inputs are one: the first group comes out alike."""
    batches = FAMILIES["llama"].batches(4, 2)
    anatomy = anatomy_of(FAMILIES["llama"].build(), batches[0])
    allocation = some_allocation(anatomy)
    dense, _, _ = pruned("llama", batches, "admm", allocation=allocation)
    own, _, _ = pruned("llama", batches, "admm", allocation=allocation, criterion_options={"targets": "own"})
    differing = []
    for layer in anatomy.blocks[0].layers:
        one, other = dense.get_parameter(layer.name), own.get_parameter(layer.name)
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
            differing.append(layer.module.rpartition(".")[2])
    assert not {"q_proj", "k_proj", "v_proj"} & set(differing)
    assert "down_proj" in differing


@pytest.mark.parametrize("name", ["llama", "gpt2", "blip2_t5", "clip"])
@pytest.mark.parametrize("half", [False, True])
def test_running_on_from_a_cut_changes_nothing(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks are run from their beginning each time; here they are not, and in half precision compute in fp32."""
    found, runs = [], []
    follow = ResumedCalls._run_recorded
    monkeypatch.setattr(ResumedCalls, "_run_recorded", lambda *given: runs.append(given[1].usable) or follow(*given))
    for least in (float("inf"), 0):
        monkeypatch.setattr(sequential, "WORTH_RESUMING", least)
        model, batches = FAMILIES[name].build(), FAMILIES[name].batches(2, 2)
        model = model.bfloat16() if half else model
        api.prune(
            model, batches, 0.5, importance="uniform", criterion="admm", criterion_options={"iterations": 2},
            compute_dtype="float32",
        )  # fmt: skip
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        assert bool(runs) == (least == 0)
    assert all(runs)  # each of them could be followed
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
