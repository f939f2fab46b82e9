"""The linear rules against the published formulas, and by their properties."""

from __future__ import annotations

import itertools
import math
import random
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecoflap.allocation import RULES, Allocation, LayerSize, allocate
from ecoflap.allocation.rules import level
from ecoflap.errors import InfeasibleAllocation, InvalidOption, UnknownName

RULE_NAMES = ("linear", "linear-relative")


def layer(name: str, weights: int, score: float | None, block: str = "", tower: str = "t") -> LayerSize:
    return LayerSize(name, tower, block or name, weights, score, "language")


def kept(allocation: Allocation) -> dict[str, int]:
    return {row.name: row.weights - row.zeros for row in allocation.layers}


def owl_shares(scores: list[float], sparsity: float, spread: float) -> np.ndarray:
    """Kept shares as OWL and DLP publish them, for blocks of one size."""
    x = np.array(scores)
    scaled = (x - x.min()) / (x.max() - x.min()) * 2 * spread
    return scaled - scaled.mean() + (1 - sparsity)


def alphapruning_ratios(alphas: list[float], sizes: list[int], sparsity: float, spread: float) -> np.ndarray:
    """Sparsities as AlphaPruning publishes them."""
    a, n = np.array(alphas), np.array(sizes)
    ratios = (a - a.min()) / (a.max() - a.min()) * 2 * spread + 1 - spread
    return ratios * sparsity * n.sum() / (n * ratios).sum()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=12).filter(lambda xs: max(xs) - min(xs) > 1e-3),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.sampled_from([0.02, 0.08, 0.14]),
)
def test_linear_is_the_published_map(scores: list[float], sparsity: float, spread: float) -> None:
    layers = [layer(f"l{i:02}", 10_000, score) for i, score in enumerate(scores)]
    allocation = allocate(layers, sparsity=sparsity, rule="linear", spread=spread)
    expected = 10_000 * owl_shares(scores, sparsity, spread)
    assert all(abs(k - e) <= 1.001 for k, e in zip(kept(allocation).values(), expected, strict=True))
    assert (allocation.rule, allocation.aggregate, allocation.max_sparsity) == ("linear", "layer-mean", 1.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1.1, 12), st.integers(1000, 90_000)), min_size=2, max_size=12).filter(
        lambda xs: max(xs)[0] - min(xs)[0] > 1e-3
    ),
    st.sampled_from([0.3, 0.5, 0.6]),
    st.sampled_from([0.1, 0.3]),
)
@example([(2.0, 1481), (2.0, 1481), (2.0, 1481), (3.0, 4682)], 0.3, 0.1)  # 2737.5 zeros in all
def test_linear_relative_is_the_published_map(groups: list[tuple[float, int]], sparsity: float, spread: float) -> None:
    alphas, sizes = [a for a, _ in groups], [n for _, n in groups]
    expected = alphapruning_ratios(alphas, sizes, sparsity, spread)
    if expected.max() > 1:  # then shares are cut off, which the published map leaves to chance
        return
    layers = [layer(f"l{i:02}", n, max(alphas) - a) for i, (a, n) in enumerate(groups)]
    allocation = allocate(layers, sparsity=sparsity, rule="linear-relative", spread=spread)
    for row, ratio in zip(allocation.layers, expected, strict=True):
        # Each row is rounded by less than one weight, and the budget that they share by up to half of one.
        assert abs(row.zeros - ratio * row.weights) <= 1.501


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sparsity = draw(st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.95]))
    count = draw(st.integers(1, 12))
    layers = [
        layer(
            f"l{i:02}",
            draw(st.integers(1, 2000)),
            draw(st.one_of(st.just(0.0), st.floats(0, 10), st.sampled_from([1e300, 1e-300, 1.0]))),
            f"b{draw(st.integers(0, 5))}",
        )
        for i in range(count)
    ]
    return {
        "layers": layers,
        "sparsity": sparsity,
        "rule": draw(st.sampled_from(RULE_NAMES)),
        "spread": draw(st.sampled_from([None, 0.0, 0.08, 0.5, 0.99])),
        "max_sparsity": draw(st.sampled_from([None, 1.0, min(1.0, sparsity + 0.05)])),
        "min_sparsity": draw(st.sampled_from([0.0, max(0.0, sparsity - 0.05)])),
        "granularity": draw(st.sampled_from(["block", "layer", "tower"])),
    }


def groups_of(allocation: Allocation) -> dict[str, tuple[int, int]]:
    """Group to (weights, zeros)."""
    found: dict[str, tuple[int, int]] = {}
    for row in allocation.layers:
        key = {"block": row.block, "layer": row.name, "tower": row.tower}[allocation.granularity]
        weights, zeros = found.get(key, (0, 0))
        found[key] = (weights + row.weights, zeros + row.zeros)
    return found


@settings(max_examples=400, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_budget_limits_order_and_monotony(case: dict[str, Any], shuffler: random.Random) -> None:
    layers = case["layers"]
    try:
        allocation = allocate(**case)
    except InfeasibleAllocation:
        assert case["max_sparsity"] is not None or case["min_sparsity"]
        return
    total = sum(s.weights for s in layers)
    assert total - allocation.zeros == round((1 - Fraction(str(case["sparsity"]))) * total)
    cap = 1 if case["max_sparsity"] is None else Fraction(str(case["max_sparsity"]))
    floor = Fraction(str(case["min_sparsity"]))
    groups = groups_of(allocation)
    assert all(floor * weights <= zeros <= cap * weights for weights, zeros in groups.values())
    shuffled = layers[:]
    shuffler.shuffle(shuffled)
    assert kept(allocate(**{**case, "layers": shuffled})) == kept(allocation)
    shifted = [
        LayerSize(s.name, s.tower, s.block, s.weights, math.ldexp(s.score, 3), s.modality)
        for s in layers
        if s.score < 1e299
    ]
    if len(shifted) == len(layers) and all(s.score > 1e-290 or s.score == 0 for s in layers):
        assert kept(allocate(**{**case, "layers": shifted})) == kept(allocation)
    if case["granularity"] == "layer":
        ranked = sorted(layers, key=lambda s: s.score)
        for low, high in itertools.pairwise(ranked):  # a higher score never gets a higher sparsity
            if low.score < high.score:
                more, less = (Fraction(groups[s.name][1], s.weights) for s in (low, high))
                assert less <= more + Fraction(1, low.weights) + Fraction(1, high.weights)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_equal_scores_and_no_spread_are_uniform(rule: str) -> None:
    equal = [layer("a", 100, 2.0), layer("b", 300, 2.0)]
    assert kept(allocate(equal, sparsity=0.7, rule=rule)) == {"a": 30, "b": 90}
    different = [layer("a", 100, 2.0), layer("b", 300, 7.0)]
    assert kept(allocate(different, sparsity=0.7, rule=rule, spread=0.0)) == {"a": 30, "b": 90}


def test_hand_made_cases() -> None:
    layers = [layer("a", 100, 0.0), layer("b", 100, 0.5), layer("c", 100, 1.0)]
    assert kept(allocate(layers, sparsity=0.5, rule="linear", spread=0.1)) == {"a": 40, "b": 50, "c": 60}
    assert kept(allocate(layers, sparsity=0.5, rule="linear-relative", spread=0.2)) == {"a": 40, "b": 50, "c": 60}
    # Cut off at 0.55: "a" keeps 45, and the others come down together by 2.5.
    capped = allocate(layers, sparsity=0.5, rule="linear", spread=0.1, max_sparsity=0.55)
    assert kept(capped) == {"a": 45, "b": 48, "c": 57}
    # Cut off at 1: the factor grows until the others make up for it.
    assert kept(allocate(layers, sparsity=0.9, rule="linear-relative", spread=0.5)) == {"a": 0, "b": 0, "c": 30}
    # Of unequal groups the mean is weighted: 2 · 0.1 · (0, 1) less 0.15 and plus 0.5.
    unequal = [layer("a", 100, 3.0), layer("b", 300, 9.0)]
    assert kept(allocate(unequal, sparsity=0.5, rule="linear", spread=0.1)) == {"a": 35, "b": 165}


def test_default_spreads_and_aggregates() -> None:
    layers = [layer("a1", 100, 1.0, "a"), layer("a2", 300, 3.0, "a"), layer("b", 400, 6.0, "b")]
    of_mean = allocate(layers, sparsity=0.5, rule="linear")
    assert groups_of(of_mean) == {"a": (400, 232), "b": (400, 168)}  # ± 0.08
    relative = allocate(layers, sparsity=0.5, rule="linear-relative")
    assert groups_of(relative) == {"a": (400, 260), "b": (400, 140)}  # ± 30 %
    three = [*layers, layer("c", 400, 3.0, "c")]
    by_mean = groups_of(allocate(three, sparsity=0.5, rule="linear"))  # 2, 6, 3
    by_sum = groups_of(allocate(three, sparsity=0.5, rule="linear", aggregate="sum"))  # 4, 6, 3
    assert by_mean["a"][1] > by_mean["c"][1] > by_mean["b"][1]
    assert by_sum["c"][1] > by_sum["a"][1] > by_sum["b"][1]


def test_budgets_of_towers_are_mapped_apart() -> None:
    layers = [layer("v0", 100, 1.0, tower="v"), layer("v1", 100, 2.0, tower="v")]
    layers += [layer("l0", 100, 1e6, tower="l"), layer("l1", 100, 2e6, tower="l")]
    apart = allocate(layers, sparsity=0.5, rule="linear", spread=0.1, budget="tower")
    assert kept(apart) == {"v0": 40, "v1": 60, "l0": 40, "l1": 60}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "linaer"}, UnknownName, "did you mean 'linear'"),
        ({"rule": "linear", "spread": 1.5}, InvalidOption, "spread must be a number from 0 to 1, not 1.5"),
        ({"rule": "linear", "spread": -0.1}, InvalidOption, "spread"),
        ({"rule": "linear-relative", "spread": 1.0}, InvalidOption, "below 1"),
        ({"rule": "proportional", "spread": 0.1}, InvalidOption, "'proportional' has no spread"),
        ({"rule": "linear", "aggregate": "median"}, UnknownName, "choose from sum, mean, layer-mean"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate([layer("a", 10, 1.0), layer("b", 10, 2.0)], sparsity=0.5, **options)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_level_solves_its_equation(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    start = data.draw(st.lists(st.integers(-50, 50), min_size=count, max_size=count))
    slope = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    low = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    limits = [(a, a + data.draw(st.integers(0, 20))) for a in low]
    unit = data.draw(st.integers(1, 5))
    total = data.draw(st.integers(sum(low), sum(b for _, b in limits)))
    found = level(total, start, slope, limits, unit)
    assert sum(found) == total
    assert all(a <= x <= b for x, (a, b) in zip(found, limits, strict=True))
    inside = {
        (x * unit - s) / Fraction(k) for x, s, k, (a, b) in zip(found, start, slope, limits, strict=True) if a < x < b
    }
    assert len(inside) <= 1  # one c for all that are not cut off
    for c in inside:
        for x, s, k, (a, b) in zip(found, start, slope, limits, strict=True):
            assert x == min(max((s + c * k) / unit, a), b)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_instantaneous(rule: str) -> None:
    rng = random.Random(0)
    layers = [layer(f"{i}", rng.randint(1, 4_000_000), 10 ** rng.uniform(-9, 9)) for i in range(3000)]
    start = time.process_time()  # of this process: the machine may do other work
    allocation = allocate(layers, sparsity=0.6, rule=rule, granularity="layer")
    assert time.process_time() - start < 3
    assert allocation.total_weights - allocation.zeros == round(Fraction("0.4") * allocation.total_weights)


def test_every_rule_has_what_a_rule_needs() -> None:
    for name in RULES:
        rule = RULES.get(name)(None)
        assert rule.margin is None or rule.margin > 0
        assert rule.aggregate in ("sum", "mean", "layer-mean")
