"""Mixtures with stacked experts in stage 2: within a bound of memory, resumed, searched for, recovered, saved."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from families.matrix import allocation_of
from families.stacked import EXPERTS, LAYOUTS, batches, build
from torch import Tensor, nn

import ecoflap
from ecoflap import api
from ecoflap.allocation import Allocation
from ecoflap.model.anatomy import discover
from ecoflap.model.checkpoint import load
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import is_offloaded
from ecoflap.model.parts import Anatomy
from ecoflap.model.slices import stored_matrix
from ecoflap.pruning import walk
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.pruning.sequential import LayerGroup, within_room
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.gather import NUMBERS
from ecoflap.statistics.inputs import _Accumulator


class Blocks:
    """A journal in memory that can break off."""

    folder: Path | None = None

    def __init__(self, last: int = 99) -> None:
        self.kept: dict[str, PrunedBlock] = {}
        self.last = last

    def load(self, block: str) -> PrunedBlock | None:
        return self.kept.get(block)

    def save(self, block: str, pruned: PrunedBlock) -> None:
        if len(self.kept) == self.last:
            raise KeyboardInterrupt
        self.kept[block] = PrunedBlock({n: w.clone() for n, w in pruned.weights.items()}, pruned.unreached)

    def place(self, block: str) -> Path | None:
        return None


def prune_to(model: nn.Module, anatomy: Anatomy, criterion: str, **options: Any) -> tuple[Allocation, tuple[str, ...]]:
    return api.prune_to(model, anatomy, allocation_of(anatomy, uniform=True), batches(), criterion=criterion, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("layout", ["Mixtral", "GptOss", "Llama4Text"])
def test_experts_in_groups_are_pruned_as_all_at_once(
    layout: str, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = build(layout)
    anatomy = discover(dense, batches()[0])
    at_once, in_groups = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = prune_to(at_once, anatomy, criterion)
    monkeypatch.setattr(walk, "EXPERTS_ROOM", 1)
    assert prune_to(in_groups, anatomy, criterion) == expected
    assert same(at_once, in_groups)


def test_groups_hold_as_many_experts_as_there_is_room_for() -> None:
    anatomy = discover(build("Mixtral"), batches()[0])
    layers = anatomy.layers
    size = sum(3 * 4 * layer.shape[1] ** 2 for layer in layers if layer.expert.endswith("[0]"))
    for room, experts in ((1, 1), (2 * size, 2), (3 * size, 3), (EXPERTS * size, EXPERTS)):
        found = within_room([LayerGroup(layers)], lambda columns: columns**2, room)
        assert sorted(layer.name for group in found for layer in group.layers) == sorted(layer.name for layer in layers)
        inside = [{layer.expert for layer in group.layers if layer.expert} for group in found]
        assert max(map(len, inside)) == experts
        assert sum(map(len, inside)) == EXPERTS  # none is divided
        if len(found) > 1:
            assert not inside[-1]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm"])
def test_a_walk_goes_on_where_it_was_broken_off(criterion: str) -> None:
    dense = build("Mixtral", num_hidden_layers=2)
    anatomy = discover(dense, batches()[0])
    whole, broken, resumed = (copy.deepcopy(dense) for _ in range(3))
    expected = prune_to(whole, anatomy, criterion)
    journal = Blocks(last=1)
    with pytest.raises(KeyboardInterrupt):
        prune_to(broken, anatomy, criterion, journal=journal)
    assert set(journal.kept) == {"model.layers.0"}
    journal.last = 99
    ways: set[str] = set()
    experts = resumed.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: ways.add(module.config._experts_implementation))
    assert prune_to(resumed, anatomy, criterion, journal=journal) == expected
    assert same(whole, resumed)
    # Its dense outputs are computed in the way of the first walk, which may round them otherwise.
    assert ("eager" in ways) == (criterion == "admm")


@pytest.mark.parametrize("criterion", ["global-magnitude", "iterative-gradient"])
def test_global_criteria_compare_slices_with_all_others(criterion: str) -> None:
    model = build("Mixtral")
    dense = copy.deepcopy(model)
    result = ecoflap.prune(model, batches(), sparsity=0.5, criterion=criterion, importance="uniform")
    assert sum(row.zeros for row in result.allocation.layers) == round(0.5 * result.anatomy.prunable_parameters)
    assert len({row.sparsity for row in result.allocation.layers if row.name.endswith("]")}) > 2
    if criterion == "global-magnitude":
        names = [row.name for row in result.allocation.layers]
        sizes = torch.cat([stored_matrix(dense, name).abs().flatten() for name in names])
        zeros = torch.cat([(stored_matrix(model, name) == 0).flatten() for name in names])
        assert sizes[zeros].max() <= sizes[~zeros].min()


@pytest.mark.parametrize("by", ["gradient", "probes"])
def test_an_allocation_is_searched_for_over_slices(by: str) -> None:
    model = build("Mixtral")
    options = {"rounds": 1, "by": by}
    result = ecoflap.prune(
        model, batches(), sparsity=0.5, importance="uniform", criterion="wanda", search=True, search_options=options
    )
    assert result.allocation.search is not None
    assert result.allocation.search.losses[-1] <= result.allocation.search.losses[0]
    for row in result.allocation.layers:
        assert int((stored_matrix(model, row.name) == 0).sum()) == row.zeros


@pytest.mark.parametrize("layout", ["Mixtral", "GptOss"])
def test_recovery_keeps_the_zeros_of_slices(layout: str) -> None:
    dense, model = build(layout), build(layout)
    result = ecoflap.prune(model, batches(), sparsity=0.5, importance="uniform", criterion="wanda")
    zeros = {row.name: stored_matrix(model, row.name) == 0 for row in result.allocation.layers}
    before = {name: stored_matrix(model, name).clone() for name in zeros}
    ecoflap.recover(model, dense, batches())
    assert all(torch.equal(stored_matrix(model, name) == 0, mask) for name, mask in zeros.items())
    assert any(not torch.equal(stored_matrix(model, name), before[name]) for name in zeros if name.endswith("]"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_mixture_is_read_by_plain_from_pretrained(layout: str, tmp_path: Path) -> None:
    model = build(layout)
    ecoflap.prune(model, batches(), sparsity=0.5, importance="gradient-norm", granularity="expert", criterion="wanda")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with torch.no_grad():
        outputs: list[Tensor] = [one.eval()(**batches()[0]).logits for one in (model, again)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layout", "criterion"), [("Mixtral", "wanda"), ("GptOss", "sparsegpt")])
def test_a_mixture_on_the_disk_is_pruned_as_in_memory(layout: str, criterion: str, tmp_path: Path) -> None:
    build(layout).save_pretrained(tmp_path / "model")
    picos.tokenizer().save_pretrained(tmp_path / "model")
    whole = load(tmp_path / "model", device="cpu").model
    spread = load(tmp_path / "model", device="cpu", device_map="disk").model
    assert is_offloaded(spread)
    results = [
        ecoflap.prune(model, batches(), sparsity=0.5, importance="gradient-norm", criterion=criterion)
        for model in (whole, spread)
    ]
    assert results[0].importance == results[1].importance
    assert results[0].allocation == results[1].allocation
    assert fingerprint(whole) == fingerprint(spread)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm"])
def test_what_is_gathered_for_experts_stays_within_its_room(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the sums of all statistics that exist, whenever one of them grows or is filled up."""
    model = build("Mixtral", num_local_experts=8, hidden_size=32, intermediate_size=32)
    anatomy = discover(model, batches()[0])
    numbers = NUMBERS[{"wanda": "norm", "sparsegpt": "gram", "admm": "pair"}[criterion]](32)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peak = 0

    def counting(method: Any) -> Any:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal peak
            alive.add(self)
            result = method(self, *args, **kwargs)
            peak = max(peak, sum(part.nbytes for one in alive for part in one.sums()))
            return result

        return counted

    for name in ("_tokens_of", "fill_up", "close"):
        monkeypatch.setattr(_Accumulator, name, counting(getattr(_Accumulator, name)))
    found = []
    for experts in (1, 2, 8):
        room = experts * 2 * 3 * 4 * numbers
        monkeypatch.setattr(walk, "EXPERTS_ROOM", room)
        peak = 0
        prune_to(copy.deepcopy(model), anatomy, criterion, tokens=TokenChoice(experts=10**6))
        found.append(peak)
        others = 2 * 2 * 4 * numbers  # attention's two inputs, which come in a pass of their own or beside
        assert 0 < peak <= room + others
    assert found[0] < found[-1] or criterion == "admm"
