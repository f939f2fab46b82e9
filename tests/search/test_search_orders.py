"""A search by the inputs in the pruned model: it measures what stage 2 makes, to the bit, and never ends above it."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from searching import Journal, Subject, bits, even, quiet, searched, subject, uneven

from ecoflap import api
from ecoflap.allocation import Allocation, SearchRecord
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.model.parts import Layer
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel
from ecoflap.search.options import SearchOptions
from ecoflap.search.order import Order
from ecoflap.search.pruned_model import Orders, PrunedModel
from ecoflap.search.search import Found, refine
from ecoflap.statistics.choice import TokenChoice


def walked(it: Subject, allocation: Allocation, criterion: str, tokens: str = "all") -> Subject:
    """The same at work on a copy that stage 2 has pruned."""
    model = copy.deepcopy(it.model)
    api.prune_to(
        model, it.anatomy, allocation, it.batches, criterion=criterion, pattern="unstructured", loss=it.loss,
        tokens=TokenChoice(tokens),
    )  # fmt: skip
    return Subject(model, it.anatomy, it.batches, it.loss)


def divergence_of(it: Subject, pruned: Subject) -> float:
    divergence = Divergence(it.model, it.batches, it.loss)
    with quiet(it.model):
        divergence.record()
    divergence._model = pruned.model
    with quiet(pruned.model):
        return math.fsum(divergence.value(index) for index in range(len(it.batches))) / len(it.batches)


def search(it: Subject, start: Allocation, criterion: str, journal: Journal | None = None, **options: Any) -> Found:
    return searched(
        it, start, criterion=criterion,
        shares={"sparsity": 0.5, "max_sparsity": 0.8}, options=SearchOptions(**{"inputs": "both", **options}),
        journal=journal,
    )  # fmt: skip


FAMILIES = ("llama", "gpt2", "llava", "t5", "blip2_t5", "clip", "shared_llama", "experts")


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, "all") for name in FAMILIES), ("llava", "text"), ("blip2_t5", "text")]
)
def test_the_walk_is_that_of_stage_2(name: str, criterion: str, tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it, before = subject(name), bits(subject(name).model)
    start = uneven(it.anatomy)
    zeros = {row.name: row.zeros for row in start.layers}
    pruned = walked(it, start, criterion, tokens)
    seen: list[Orders] = []

    def caught(*arguments: Any, **_: Any) -> Found:
        seen.append(arguments[4])
        return Found(start, SearchRecord("kl", (0.0,), ("start",), zeros, {}))

    monkeypatch.setattr("ecoflap.search.search.refine", caught)
    searched(
        it, start, criterion=criterion, shares={},
        options=SearchOptions(inputs="pruned"), tokens=TokenChoice(tokens),
    )  # fmt: skip
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        order = seen[0].along(zeros, masked)
        losses = [it.loss_of(it.model, index) for index in range(len(it.batches))]
        for layer in it.anatomy.layers:
            assert torch.equal(_weight(it, order, layer, zeros[layer.name]), _stored(pruned, layer))
    assert losses == [pruned.loss_of(pruned.model, index) for index in range(len(it.batches))]
    assert bits(it.model) == before


def _stored(it: Subject, layer: Layer) -> torch.Tensor:
    weight = it.model.get_parameter(layer.name).detach()
    return weight.t() if layer.transposed else weight


def _weight(it: Subject, order: Order, layer: Layer, zeros: int) -> torch.Tensor:
    """(out, in): the layer pruned by this order."""
    found = order.stand_in(it.model, layer, zeros)
    return _stored(it, layer).masked_fill(~found, 0) if found.dtype == torch.bool else found


@pytest.mark.parametrize(
    ("name", "criterion", "by", "inputs"),
    [("llama", "wanda", "gradient", "both"), ("llama", "sparsegpt", "gradient", "both"),
     ("llava", "wanda", "probes", "both"), ("t5", "sparsegpt", "probes", "both"),
     ("llama", "magnitude", "gradient", "both"), ("llama", "sparsegpt", "gradient", "pruned"),
     ("llava", "wanda", "gradient", "pruned"), ("t5", "wanda", "probes", "pruned")],
)  # fmt: skip
def test_the_last_loss_is_that_of_the_pruned_model(name: str, criterion: str, by: str, inputs: str) -> None:
    it, before = subject(name), bits(subject(name).model)
    start = uneven(it.anatomy)
    found = search(it, start, criterion, rounds=2, by=by, inputs=inputs)
    assert bits(it.model) == before
    assert all("forward" not in module.__dict__ for module in it.model.modules())
    last = divergence_of(it, walked(it, found.allocation, criterion))
    assert found.record.losses[-1] == pytest.approx(last, rel=1e-5)
    assert last <= divergence_of(it, walked(it, start, criterion)) * (1 + 1e-5)
    assert sum(row.zeros for row in found.allocation.layers) == sum(row.zeros for row in start.layers)
    assert all(row.zeros < 0.8 * row.weights + 1 for row in found.allocation.layers)


def test_it_ends_no_higher_than_the_search_by_dense_inputs() -> None:
    it = subject("llama")
    start = even(it.anatomy)
    ends = {}
    for inputs in ("dense", "both"):
        found = searched(
            it, start, criterion="sparsegpt",
            shares={"sparsity": 0.5}, options=SearchOptions(inputs=inputs, rounds=2),
        )  # fmt: skip
        ends[inputs] = divergence_of(it, walked(it, found.allocation, "sparsegpt"))
    assert ends["both"] <= ends["dense"] * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "inputs"), [("wanda", "both"), ("sparsegpt", "both"), ("wanda", "pruned")])
def test_from_every_state_it_ends_with_the_same_bits(criterion: str, inputs: str) -> None:
    it, journal = subject("llama"), Journal()
    start = uneven(it.anatomy)
    whole = search(it, start, criterion, journal, rounds=2, tolerance=0.0, inputs=inputs)
    assert len(journal.saved) >= 3
    states = list(enumerate(journal.saved))
    for number, state in states if criterion == "wanda" else states[1::2]:  # walks with SparseGPT are slow
        later = Journal(state)
        found = search(it, start, criterion, later, rounds=2, tolerance=0.0, inputs=inputs)
        assert found == whole
        assert later.saved == journal.saved[number + 1 :]


def test_an_order_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a criterion whose order no input decides, walks change nothing but which steps are tried."""
    monkeypatch.setattr("ecoflap.search.rounds.WALKED_STEPS", (0.1,))
    monkeypatch.setattr("ecoflap.search.rounds.STEPS", (0.1,))
    monkeypatch.setattr("ecoflap.search.rounds.PARTS", ())
    it = subject("llama")
    order = Order.of({}, needs="none", compare=None)
    limits = {"sparsity": 0.5, "max_sparsity": 0.8}
    found = {
        inputs: refine(
            it.model, it.anatomy, uneven(it.anatomy), it.batches, order, loss=it.loss, shares=limits,
            options=SearchOptions(inputs=inputs, rounds=8, granularity="block"),
        )
        for inputs in ("dense", "pruned", "both")
    }  # fmt: skip
    dense = found["dense"].record.losses
    assert found["both"].record.losses[: len(dense)] == dense
    assert found["both"].record.losses[-1] <= dense[-1]
    assert found["pruned"].allocation == found["dense"].allocation
    assert found["pruned"].record.losses == dense


def test_walks_decide_where_a_search_by_walks_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The given allocation or an even one: the better of the two that stage 2 makes, and no dense order is found."""
    monkeypatch.setattr(Orders, "dense", None)
    it = subject("llama")
    poor = uneven(it.anatomy)
    good = search(it, poor, "sparsegpt", rounds=2, inputs="pruned").allocation
    flat = divergence_of(it, walked(it, even(it.anatomy), "sparsegpt"))
    for start, better in ((poor, False), (good, True)):
        given = divergence_of(it, walked(it, start, "sparsegpt"))
        assert (given < flat) == better
        found = search(it, start, "sparsegpt", rounds=0, inputs="pruned")
        assert found.record.losses == (pytest.approx(min(given, flat), rel=1e-5),)


def test_the_first_lower_step_along_walks_is_taken_and_its_walk_serves_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    it, walks, losses = subject("llama"), [], []
    along, measure = Orders.along, PrunedModel.measure

    def walking(self: Orders, zeros: Mapping[str, int], masked: MaskedModel) -> Order:
        walks.append(dict(zeros))
        return along(self, zeros, masked)

    def measuring(self: PrunedModel, zeros: Mapping[str, int], *, walking: bool) -> float:
        losses.append(measure(self, zeros, walking=walking))
        return losses[-1]

    monkeypatch.setattr(Orders, "along", walking)
    monkeypatch.setattr(PrunedModel, "measure", measuring)
    journal = Journal()
    found = search(it, even(it.anatomy), "sparsegpt", journal, rounds=4, inputs="pruned", granularity="block")
    assert len(found.record.losses) > 2
    lowest = list(itertools.accumulate(losses, min))
    assert list(found.record.losses) == sorted(set(lowest), reverse=True)
    assert len(walks) == len(losses)
    steps = [json.loads(state) for state in journal.saved]
    grown = [len(one["history"]) for one in steps]
    assert grown[:-1] == list(range(2, len(steps) + 1))
    assert grown[-1] in (len(steps), len(steps) + 1)  # the last round may find nothing lower
    assert all(one["step"] <= 0.1 for one in steps[:-1])  # the last one: of what would follow


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_weights_move_across_towers_where_the_search_may(inputs: str) -> None:
    it = subject("llava")
    start = even(it.anatomy, budget="tower")

    def tower_zeros(allocation: Allocation) -> dict[str, int]:
        towers = {row.tower for row in allocation.layers}
        return {tower: sum(row.zeros for row in allocation.layers if row.tower == tower) for tower in towers}

    given, free = (
        searched(
            it, start, criterion="wanda",
            shares={"sparsity": 0.5, "budget": "tower"},
            options=SearchOptions(inputs=inputs, rounds=2, budget=budget),
        ).allocation
        for budget in ("given", "global")
    )  # fmt: skip
    assert tower_zeros(given) == tower_zeros(start) != tower_zeros(free)
    assert free.zeros == start.zeros


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UnknownName, match="pruned"):
        SearchOptions(inputs="sparse")
    with pytest.raises(UnknownName, match="text"):
        SearchOptions(positions="answers")
    with pytest.raises(UnknownName, match="global"):
        SearchOptions(budget="tower")
    for inputs in ("pruned", "both"):
        with pytest.raises(InvalidOption, match="swaps need inputs=dense"):
            SearchOptions(inputs=inputs, swaps=1)
