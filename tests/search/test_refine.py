"""The search: it never gets worse, keeps budgets and caps to the weight, leaves no trace, and goes on bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from searching import Journal, Subject, bits, even, order_of, quiet, really_pruned, searched, subject, uneven
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.patterns import Unstructured
from ecoflap.data.objectives import on_device
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.model.anatomy import discover
from ecoflap.pruning.criteria import make_criterion
from ecoflap.search.divergence import Divergence
from ecoflap.search.options import BY, PHASES, SearchOptions, State
from ecoflap.search.order import Order
from ecoflap.search.rounds import Search
from ecoflap.search.search import Found, refine, search_options
from ecoflap.search.solve import budgets_of
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics


def search(
    it: Subject, allocation: Allocation, journal: Journal | None = None, shares: Any = (), seed: int = 0, **options: Any
) -> Found:
    limits = {"sparsity": 0.5, "max_sparsity": 0.8, **dict(shares)}
    return refine(
        it.model, it.anatomy, allocation, it.batches, order_of(it), loss=it.loss, shares=limits,
        options=SearchOptions(**options), seed=seed, journal=journal,
    )  # fmt: skip


def zeros_of(allocation: Allocation) -> dict[str, int]:
    return {row.name: row.zeros for row in allocation.layers}


def measured(it: Subject, allocation: Allocation, metric: str = "auto") -> float:
    """The divergence of a copy that is really pruned to this allocation."""
    order = order_of(it)
    masks = {x: order.mask(it.model, x, zeros_of(allocation)[x.name]) for x in it.anatomy.layers}
    divergence = Divergence(it.model, it.batches, it.loss, metric)
    with quiet(it.model):
        divergence.record()
    divergence._model = really_pruned(it.model, masks)
    with quiet(divergence._model):
        return math.fsum(divergence.value(i) for i in range(len(it.batches))) / len(it.batches)


LIMITS: dict[str, dict[str, Any]] = {
    "global": {},
    "tower": {"budget": "tower"},
    "own": {"tower_sparsity": {"vision": 0.3}},
    "floor": {"min_sparsity": 0.35},
}


@pytest.mark.parametrize(
    ("name", "by", "granularity", "limits"),
    [
        ("llama", "gradient", "layer", "global"),
        ("llama", "probes", "layer", "floor"),
        ("llama", "gradient", "block", "global"),
        ("gpt2", "gradient", "kind", "global"),
        ("gpt2", "probes", "block", "floor"),
        ("shared_llama", "probes", "kind", "global"),
        ("shared_llama", "gradient", "layer", "global"),
        ("experts", "gradient", "layer", "global"),
        ("uncalled", "gradient", "layer", "global"),
        ("llava", "gradient", "layer", "tower"),
        ("llava", "gradient", "kind", "own"),
        ("llava", "probes", "block", "own"),
        ("clip", "gradient", "layer", "tower"),
    ],
)
def test_the_loss_falls_within_budgets_and_caps(name: str, by: str, granularity: str, limits: str) -> None:
    it, before = subject(name), bits(subject(name).model)
    options = {key: value for key, value in LIMITS[limits].items() if key != "min_sparsity"}
    start = uneven(it.anatomy, **LIMITS[limits])
    found = search(it, start, shares=LIMITS[limits], by=by, granularity=granularity, rounds=2, swaps=6)
    assert bits(it.model) == before
    assert all("forward" not in module.__dict__ for module in it.model.modules())
    assert not it.model._forward_hooks
    assert len(found.record.losses) > 1
    assert all(later < earlier for earlier, later in zip(found.record.losses, found.record.losses[1:], strict=False))
    assert found.record.losses[0] <= measured(it, start) * (1 + 1e-5)
    assert found.record.losses[-1] == pytest.approx(measured(it, found.allocation), rel=1e-4)
    ours, theirs = zeros_of(found.allocation), zeros_of(start)
    assert list(ours) == list(theirs)
    for names in budgets_of(start, options):
        assert sum(ours[x] for x in names) == sum(theirs[x] for x in names)
    floor = LIMITS[limits].get("min_sparsity", 0.0)
    for row in found.allocation.layers:  # a block's layers share its sparsity in whole weights
        slack = 0 if granularity != "block" else 1
        assert floor * row.weights - slack - 1 < row.zeros < 0.8 * row.weights + slack + 1
    assert found.allocation.max_sparsity == 0.8
    assert found.record.metric == ("loss" if name == "uncalled" else "kl")


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("budget", "inputs"), [("global", "dense"), ("tower", "dense"), ("tower", "pruned")])
def test_a_block_that_nobody_reads_goes_first(
    by: str, budget: str, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a LLaVA that takes the features of the last block but one: at once, however short the steps are."""
    for steps in ("STEPS", "WALKED_STEPS"):
        monkeypatch.setattr(f"ecoflap.search.rounds.{steps}", (0.025,))
    it = subject("llava")
    unread = it.anatomy.towers[0].blocks[-1]
    options = {"by": by, "inputs": inputs, "granularity": "block", "rounds": 1}
    found = search(it, even(it.anatomy, budget=budget), shares={"budget": budget}, **options)
    rows = {row.name: row for row in found.allocation.layers}
    for layer in unread.layers:
        assert rows[layer.name].zeros - math.floor(0.8 * layer.numel) in (0, 1)  # blocks are solved for as a whole


def test_what_costs_nothing_because_nothing_was_lost_stays() -> None:
    """A layer that has lost only zeros, or no token, is not taken for one that nobody reads."""
    it = subject("llava")
    unread = it.anatomy.towers[0].blocks[-1]
    limits = {"sparsity": 0.5, "max_sparsity": 0.8, "budget": "tower"}
    norms = dict(order_of(it).norms)
    for layer in unread.layers:
        del norms[layer.name]
    order = Order(norms, weighted=True, compare="row")
    start = even(it.anatomy, budget="tower")
    begun: list[dict[str, int]] = []

    class Watching(Search):
        def _stepped(self, here: State, *args: Any) -> State:
            begun.append(dict(here.zeros))
            return here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecoflap.search.search.Search", Watching)
        for one in (order, order_of(it)):
            refine(
                it.model, it.anatomy, start, it.batches, one, loss=it.loss, shares=limits,
                options=SearchOptions(rounds=1, granularity="block"),
            )  # fmt: skip
    assert begun[0] == zeros_of(start)
    assert begun[-1] != zeros_of(start)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_where_no_near_shares_are_lower_part_of_the_way_to_far_ones_is_tried(
    inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for walks, which cost too much for that."""
    monkeypatch.setattr(Search, "_near", lambda *args: (args[-2], "nowhere"))
    it = subject("llama")
    start = uneven(it.anatomy)
    found = search(it, start, rounds=3, inputs=inputs)
    assert (len(found.record.losses) > 1) == (inputs == "dense")
    if inputs == "dense":
        assert measured(it, found.allocation) < min(measured(it, start), measured(it, even(it.anatomy)))


def test_nothing_to_do_leaves_the_allocation_or_the_even_one() -> None:
    it = subject("llama")
    start, flat = uneven(it.anatomy), even(it.anatomy)
    better = min((start, flat), key=lambda one: measured(it, one))
    found = search(it, start, rounds=0, swaps=0)
    assert zeros_of(found.allocation) == zeros_of(better)
    assert found.record.losses == (pytest.approx(measured(it, better), rel=1e-5),)
    best = search(it, start, rounds=4).allocation  # measures lower than the even one: it stays
    again = search(it, best, rounds=0)
    assert zeros_of(again.allocation) == zeros_of(best)
    assert zeros_of(search(it, flat, rounds=0).allocation) == zeros_of(flat)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"by": "gradient", "granularity": "layer", "rounds": 2, "swaps": 3}),
        ("gpt2", {"by": "probes", "granularity": "kind", "rounds": 1, "swaps": 2}),
    ],
)
def test_from_every_state_it_ends_with_the_same_bits(name: str, options: dict[str, Any]) -> None:
    it, journal = subject(name), Journal()
    start = uneven(it.anatomy)
    whole = search(it, start, journal, seed=3, tolerance=0.0, **options)
    phases = len(PHASES[options["granularity"]])
    assert len(journal.saved) == phases * options["rounds"] + options["swaps"]
    for number, state in enumerate(journal.saved):
        later = Journal(state)
        found = search(it, start, later, seed=3, tolerance=0.0, **options)
        assert found == whole
        assert later.saved == journal.saved[number + 1 :]


def test_swaps_go_by_the_seed_alone() -> None:
    it = subject("llama")
    start = uneven(it.anatomy)
    first, again, other = (search(it, start, rounds=0, swaps=15, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert zeros_of(other.allocation) != zeros_of(first.allocation)
    assert len(first.record.losses) > 1
    torch.manual_seed(99)
    assert search(it, start, rounds=0, swaps=15, seed=1).record.losses == first.record.losses


def test_swaps_stay_within_a_tower_and_its_cap() -> None:
    it = subject("llava")
    start = even(it.anatomy, budget="tower")
    found = search(it, start, shares={"budget": "tower", "max_sparsity": 0.505}, rounds=0, swaps=24)
    ours, theirs = zeros_of(found.allocation), zeros_of(start)
    assert ours != theirs
    for tower in it.anatomy.towers:
        assert sum(ours[x.name] for x in tower.layers) == sum(theirs[x.name] for x in tower.layers)
    assert all(row.zeros <= max(0.505 * row.weights, theirs[row.name]) for row in found.allocation.layers)
    assert found.allocation.granularity == "layer"


@pytest.mark.parametrize("swaps", [0, 4])
def test_the_result_says_what_shares_a_sparsity(swaps: int) -> None:
    it = subject("llama")
    for granularity in PHASES:
        found = search(it, even(it.anatomy), granularity=granularity, rounds=1, swaps=swaps)
        alike = granularity == "block" and swaps == 0
        assert found.allocation.granularity == ("block" if alike else "layer")


class OneWay(nn.Module):
    """Blocks whose output can't be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return NoBackward.apply(x.square().mean())


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError("this operator\nhas no backward")


def test_a_model_without_gradients_is_searched_by_probes_alone() -> None:
    model = OneWay()
    batches = [{"x": torch.randn(8, 16)}]
    loss = on_device(lambda model, batch: model(**batch))
    it = Subject(model, discover(model, batches[0], run=loss), batches, loss)
    before = bits(model)
    with pytest.raises(InvalidOption, match=r"OneWay can't be differentiated.*by=probes") as refused:
        search(it, uneven(it.anatomy), by="gradient")
    assert len(str(refused.value).splitlines()) == 1
    assert bits(model) == before
    assert all("forward" not in module.__dict__ for module in model.modules())
    found = search(it, uneven(it.anatomy), by="probes")
    assert found.record.metric == "loss"
    assert found.record.losses[-1] <= found.record.losses[0]


def test_probes_and_gradients_agree_on_where_to_go() -> None:
    """Both find a far better allocation than the one they begin with."""
    it = subject("llama")
    start = uneven(it.anatomy)
    ends = {by: search(it, start, by=by, rounds=2).record.losses[-1] for by in BY}
    assert max(ends.values()) < min(measured(it, start), measured(it, even(it.anatomy)))


def test_the_search_takes_the_first_samples() -> None:
    it = subject("llama")
    arguments = {"criterion": "wanda", "shares": {"sparsity": 0.5}}
    few = Subject(it.model, it.anatomy, it.batches[:1], it.loss)
    found = searched(it, uneven(it.anatomy), options=SearchOptions(samples=1, rounds=1), **arguments)
    limits = {"sparsity": 0.5}
    expected = refine(
        few.model, few.anatomy, uneven(it.anatomy), few.batches, order_of(it), loss=it.loss, shares=limits,
        options=SearchOptions(rounds=1),
    )  # fmt: skip
    assert found == expected
    more, every = (
        searched(it, uneven(it.anatomy), options=SearchOptions(samples=samples, rounds=1), **arguments)
        for samples in (99, 0)
    )
    assert more == every  # of fewer samples than asked, all are taken


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_the_search_measures_what_the_criterion_will_do(criterion: str) -> None:
    """With a choice of tokens the criterion removes others, and so does the model that is searched on."""
    it = subject("llava")
    start, tokens = even(it.anatomy), TokenChoice("text")
    found = searched(
        it, start, criterion=criterion,
        shares={"sparsity": 0.5}, options=SearchOptions(rounds=0, metric="loss"), tokens=tokens,
    )  # fmt: skip
    pruned = copy.deepcopy(it.model)
    statistics = dict(
        one
        for _, block in dense_statistics(it.model, it.anatomy, it.batches, it.loss, kind="gram", tokens=tokens)
        for one in block.items()
    )
    for layer in it.anatomy.layers:
        weight, zeros = pruned.get_parameter(layer.name), {row.name: row.zeros for row in start.layers}[layer.name]
        result = make_criterion(criterion)(weight.detach(), statistics[layer.name], zeros, Unstructured(None))
        with torch.no_grad():
            weight.copy_(result.weight)
    indices = range(len(it.batches))
    expected = sum(float(it.loss_of(pruned, i) - it.loss_of(it.model, i)) for i in indices) / len(it.batches)
    assert found.record.losses == (pytest.approx(expected, rel=1e-4),)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"by": "guess"}, UnknownName, "probes"),
        ({"granularity": "tower"}, UnknownName, "block"),
        ({"metric": "accuracy"}, UnknownName, "kl"),
        ({"rounds": -1}, InvalidOption, "rounds of the search must be at least 0"),
        ({"samples": -1}, InvalidOption, "samples"),
        ({"swaps": -1}, InvalidOption, "swaps"),
        ({"tolerance": 1.0}, InvalidOption, "tolerance"),
        ({"tolerance": -0.1}, InvalidOption, "tolerance"),
        ({"steps": 3}, InvalidOption, "steps"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as refused:
        search_options(options)
    assert len(str(refused.value).splitlines()) == 1
    assert search_options(None) == search_options({}) == SearchOptions()
