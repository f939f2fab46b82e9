"""Solving for shares: budgets to the weight, caps, scales from costs, and steps between two allocations."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import even, subject, uneven
from torch import Tensor

from ecoflap.model.parts import Layer
from ecoflap.search.solve import Shares, between, budgets_of, filled, flattened


def layers(blocks: int = 4) -> list[Layer]:
    return [
        Layer(f"{tower}.{b}.{kind}.weight", f"{tower}.{b}.{kind}", f"{tower}.{b}", tower, tower, (4, columns))
        for tower in ("vision", "language")
        for b in range(blocks)
        for kind, columns in (("q", 5), ("up", 11))
    ]


def errors(of: list[Layer], seed: int = 0) -> dict[str, Tensor]:
    """Convex, as local errors are: sorted costs summed up."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in of:
        steps = torch.rand(10, generator=generator, dtype=torch.float64).square().sort().values
        found[layer.name] = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0) * layer.numel])
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99), granularity=st.sampled_from(["block", "layer"]),
    budget=st.sampled_from(["global", "tower"]),
    sparsity=st.sampled_from([0.3, 0.5, 0.63]), cap=st.sampled_from([None, 0.7, 0.9]), own=st.booleans(),
)  # fmt: skip
def test_best_meets_every_budget_and_cap(
    seed: int, granularity: str, budget: str, sparsity: float, cap: float | None, own: bool
) -> None:
    all_layers = layers()
    options = {"sparsity": sparsity, "max_sparsity": cap, "min_sparsity": 0.1, "budget": budget}
    options["tower_sparsity"] = {"vision": 0.4} if own else {}
    shares = Shares(all_layers, errors(all_layers, seed), options)
    generator = torch.Generator().manual_seed(seed)
    scales = {layer.name: float(torch.randn((), generator=generator)) for layer in all_layers}
    zeros = shares.best(scales, granularity)
    towers = {name: [x for x in all_layers if x.tower == name] for name in ("vision", "language")}
    targets = {"vision": 0.4 if own else sparsity, "language": sparsity}
    for name, members in towers.items():
        if own or budget == "tower":
            exact = targets[name] * sum(x.numel for x in members)
            assert abs(sum(zeros[x.name] for x in members) - exact) <= 1
    total = sum(targets[x.tower] * x.numel for x in all_layers)
    assert abs(sum(zeros.values()) - total) <= 0.5 + 1e-9
    for members in shares.blocks.values() if granularity == "block" else [[x] for x in all_layers]:
        share = Fraction(sum(zeros[x.name] for x in members), sum(x.numel for x in members))
        assert Fraction(1, 10) <= share <= Fraction(str(cap or 1))
    if granularity == "block":  # one sparsity inside of a block
        for members in shares.blocks.values():
            share = sum(zeros[x.name] for x in members) / sum(x.numel for x in members)
            assert all(abs(zeros[x.name] - share * x.numel) < 1 for x in members)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_best_is_the_least_of_all_splits(seed: int) -> None:
    """Or of those within a step."""
    few = [Layer(f"t.{i}.fc.weight", f"t.{i}.fc", f"t.{i}", "t", "", (2, 5)) for i in range(3)]
    shares = Shares(few, errors(few, seed), {"sparsity": 0.5})
    generator = torch.Generator().manual_seed(seed)
    scales = {layer.name: 2 * float(torch.randn((), generator=generator)) for layer in few}

    def cost(zeros: dict[str, int]) -> float:
        return math.fsum(math.exp(scales[x.name]) * float(shares.errors[x.name][zeros[x.name]]) for x in few)

    every = (dict(zip(scales, split, strict=True)) for split in itertools.product(range(11), repeat=3))
    splits = [split for split in every if sum(split.values()) == 15]
    least = min(cost(split) for split in splits)
    assert cost(shares.best(scales, "layer")) == pytest.approx(least, rel=1e-9)
    assert cost(shares.best(scales, "block")) == pytest.approx(least, rel=1e-9)  # a layer a block
    here = splits[seed % len(splits)]
    for reach in (1, 2, 4):
        near = [split for split in splits if all(abs(split[name] - here[name]) <= reach for name in here)]
        least = min(cost(split) for split in near)
        assert cost(shares.best(scales, "layer", here, reach / 10)) == pytest.approx(least, rel=1e-9)
    assert shares.best({name: value + 700 for name, value in scales.items()}, "layer") == shares.best(scales, "layer")


def test_errors_lie_on_straight_lines_between_their_levels() -> None:
    (layer,) = few = [Layer("t.0.fc.weight", "t.0.fc", "t.0", "t", "", (4, 10))]
    shares = Shares(few, {layer.name: torch.tensor([0.0, 1.0, 3.0, 9.0, 20.0], dtype=torch.float64)}, {})
    assert [shares.error(layer, zeros) for zeros in (0, 5, 10, 15, 20, 30, 36, 40)] == pytest.approx(
        [0, 0.5, 1, 2, 3, 9, 15.6, 20]
    )


def test_scales_come_from_costs() -> None:
    all_layers = layers(2)
    shares = Shares(all_layers, errors(all_layers), {"sparsity": 0.5})
    zeros = {layer.name: layer.numel // 2 for layer in all_layers}
    now = {layer.name: shares.error(layer, zeros[layer.name]) for layer in all_layers}
    true = {layer.name: 0.5 + number for number, layer in enumerate(all_layers)}
    blocks = {name: 3.0 * sum(now[x.name] for x in members) for name, members in shares.blocks.items()}
    assert list(shares.kinds) == ["vision.q.weight", "vision.up.weight", "language.q.weight", "language.up.weight"]
    # Costs that are three times the local errors: log 3 everywhere, whatever parts are looked at.
    kinds = {name: 3.0 * sum(now[x.name] for x in members) for name, members in shares.kinds.items()}
    single = {name: 3.0 * value for name, value in now.items()}
    for more in ((), (kinds,), (None, single), (kinds, single)):
        found = shares.scales(zeros, blocks, *more)
        assert found == pytest.approx(dict.fromkeys(now, math.log(3)))
    # A layer's own cost moves it, but no further than the reach.
    blocks = {n: math.fsum(true[x.name] * now[x.name] for x in members) for n, members in shares.blocks.items()}
    near = shares.scales(zeros, blocks, None, {name: true[name] * now[name] for name in now})
    for name, members in shares.blocks.items():
        mean = blocks[name] / sum(now[x.name] for x in members)
        for x in members:
            bounds = mean / shares.reach, mean * shares.reach
            assert math.exp(near[x.name]) == pytest.approx(min(max(true[x.name], bounds[0]), bounds[1]))
    far = shares.scales(zeros, blocks, None, {name: value * 1e6 for name, value in now.items()})
    plain = shares.scales(zeros, blocks)
    assert {name: far[name] - plain[name] for name in now} == pytest.approx(dict.fromkeys(now, math.log(shares.reach)))


@pytest.mark.parametrize(("cost", "part"), [(0.0, 1e-3), (-5.0, 0.1), (1e-9, 0.1)])
def test_a_part_that_costs_nothing_is_cheap_but_not_free(cost: float, part: float) -> None:
    """Very cheap if no output depends on it at all."""
    all_layers = layers(2)
    shares = Shares(all_layers, errors(all_layers), {"sparsity": 0.5})
    zeros = {layer.name: layer.numel // 2 for layer in all_layers}
    blocks = dict.fromkeys(shares.blocks, 1.0) | {"vision.0": cost}
    found = shares.scales(zeros, blocks)
    assert all(math.isfinite(value) for value in found.values())
    now = sum(shares.error(x, zeros[x.name]) for x in shares.blocks["vision.0"])
    assert math.exp(found["vision.0.q.weight"]) * now == pytest.approx(part * 3 / 4)
    nothing = shares.scales(zeros, dict.fromkeys(shares.blocks, cost), dict.fromkeys(shares.kinds, cost),
                            {x.name: cost for x in all_layers})  # fmt: skip
    assert sum(shares.best(nothing, "layer").values()) == sum(x.numel for x in all_layers) // 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99), granularity=st.sampled_from(["block", "layer"]),
    budget=st.sampled_from(["global", "tower"]), cap=st.sampled_from([None, 0.8]),
    step=st.sampled_from([0.4, 0.2, 0.1, 0.025]),
)  # fmt: skip
def test_a_step_keeps_every_budget_and_goes_no_further(
    seed: int, granularity: str, budget: str, cap: float | None, step: float
) -> None:
    all_layers = layers()
    shares = Shares(all_layers, errors(all_layers, seed), {"sparsity": 0.5, "budget": budget, "max_sparsity": cap})
    generator = torch.Generator().manual_seed(seed)
    before, now = (
        {layer.name: 2 * float(torch.randn((), generator=generator)) for layer in all_layers} for _ in range(2)
    )
    here = shares.best(before, granularity)
    zeros = shares.best(now, granularity, here, step)
    for tower in ("vision", "language") if budget == "tower" else ("",):
        names = [x.name for x in all_layers if x.name.startswith(tower)]
        assert sum(zeros[name] for name in names) == sum(here[name] for name in names)
    assert cap is None or all(zeros[x.name] <= cap * x.numel for x in all_layers) or granularity == "block"
    for members in shares.blocks.values() if granularity == "block" else [[x] for x in all_layers]:
        moved, size = sum(zeros[x.name] - here[x.name] for x in members), sum(x.numel for x in members)
        assert abs(moved) <= (step + 0.1) * size + 1  # to the next of the ten levels, in whole weights
    assert shares.best(before, granularity, here, step) == here


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=8),
    st.sampled_from([1.0, 0.5, 0.25, 0.1]), st.randoms(),
)  # fmt: skip
def test_between_keeps_every_budget(pairs: list[tuple[int, int]], step: float, random: object) -> None:
    here = {f"l{i}": a for i, (a, _) in enumerate(pairs)}
    values = [a for a, _ in pairs]
    half = len(pairs) // 2
    budgets = [list(here)[:half], list(here)[half:]]
    there = {}  # the same zeros in another order
    for names in budgets:
        mine = [here[name] for name in names]
        random.shuffle(mine)  # type: ignore[attr-defined]
        there |= dict(zip(names, mine, strict=True))
    found = between(here, there, step, budgets)
    for names in budgets:
        assert sum(found[name] for name in names) == sum(here[name] for name in names)
    for name in here:
        assert min(here[name], there[name]) <= found[name] <= max(here[name], there[name])
        assert abs(found[name] - (here[name] + step * (there[name] - here[name]))) < 1
    assert between(here, there, 1.0, budgets) == there
    assert between(here, here, step, budgets) == here
    assert max(values) <= 50


@pytest.mark.parametrize("options", [{}, {"budget": "tower"}, {"tower_sparsity": {"vision": 0.3}},
                                     {"budget": "tower", "tower_sparsity": {"language": 0.6}}])  # fmt: skip
def test_flattened_is_the_even_allocation_of_the_same_budgets(options: dict[str, object]) -> None:
    it = subject("llava")
    given_, flat = uneven(it.anatomy, **options), even(it.anatomy, **options)
    budgets = budgets_of(given_, options)
    assert sorted(name for names in budgets for name in names) == sorted(x.name for x in it.anatomy.layers)
    assert len(budgets) == (2 if options else 1)
    zeros = flattened({row.name: row.zeros for row in given_.layers}, it.anatomy.layers, budgets)
    assert zeros == {row.name: row.zeros for row in flat.layers}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), budget=st.sampled_from(["global", "tower"]), cap=st.sampled_from([None, 0.6, 0.95]),
       floor=st.sampled_from([0.0, 0.3]))  # fmt: skip
def test_idle_layers_are_emptied_within_their_budget(
    data: st.DataObject, budget: str, cap: float | None, floor: float
) -> None:
    of = layers()
    highest = {one.name: math.floor((cap or 1.0) * one.numel) for one in of}
    lowest = {one.name: math.ceil(floor * one.numel) for one in of}
    zeros = {name: data.draw(st.integers(lowest[name], highest[name])) for name in highest}
    idle = data.draw(st.sets(st.sampled_from(sorted(zeros))))
    names = list(zeros)
    budgets = [names] if budget == "global" else [[n for n in names if n.startswith(t)] for t in ("vision", "language")]
    found = filled(zeros, idle, of, budgets, cap, floor)
    assert list(found) == names
    for members in budgets:
        assert sum(found[one] for one in members) == sum(zeros[one] for one in members)
        taking, giving = [n for n in members if n in idle], [n for n in members if n not in idle]
        assert all(zeros[one] <= found[one] <= highest[one] for one in taking)
        assert all(lowest[one] <= found[one] <= zeros[one] for one in giving)
        full = all(found[one] == highest[one] for one in taking)
        assert full or all(found[one] == lowest[one] for one in giving)
