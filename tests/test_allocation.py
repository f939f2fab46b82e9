"""Allocation against a slow literal version of the method, and by its properties."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoflap.allocation import Allocation, LayerSize, allocate
from ecoflap.errors import EcoflapError, InfeasibleAllocation, InvalidOption, NonFiniteLoss, UnknownName

SPARSITIES = [0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.85, 0.95, 1.0]


def layer(name: str, weights: int, score: float | None, block: str = "", tower: str = "t", modality: str = "language"):
    return LayerSize(name, tower, block or name, weights, score, modality)


def kept(allocation: Allocation) -> dict[str, int]:
    return {row.name: row.weights - row.zeros for row in allocation.layers}


def by_block(allocation: Allocation) -> dict[str, tuple[int, int]]:
    """(weights, kept) of each block."""
    blocks: dict[str, tuple[int, int]] = {}
    for row in allocation.layers:
        weights, keep = blocks.get(row.block, (0, 0))
        blocks[row.block] = (weights + row.weights, keep + row.weights - row.zeros)
    return blocks


def slow(sizes: list[int], scores: list[float], p: str, p_max: str, p_min: str = "0") -> list[int]:
    """Section 3 of the method to the letter: keep per group, dealt round after round until nobody overflows."""
    target, top, bottom = Fraction(p), Fraction(p_max), Fraction(p_min)
    groups = range(len(sizes))
    keep = [Fraction(-((-(1 - top) * n) // 1)) for n in sizes]
    full = [(1 - bottom) * n // 1 for n in sizes]
    left = round((1 - target) * sum(sizes)) - sum(keep)
    assert left >= 0
    score = [Fraction(s) for s in scores]
    active = {g for g in groups if keep[g] < full[g]}
    while left and active:
        if not any(score[g] for g in active):
            score = [Fraction(1)] * len(sizes)
        dealing = {g for g in active if score[g]}
        whole = sum(score[g] for g in dealing)
        share = {g: left * score[g] / whole for g in dealing}
        overflowing = {g for g in dealing if keep[g] + share[g] >= full[g]}
        if not overflowing:
            for g in dealing:
                keep[g] += share[g]
            left = Fraction(0)
        for g in overflowing:
            left -= full[g] - keep[g]
            keep[g] = Fraction(full[g])
        active -= overflowing
    rounded = [int(k // 1) for k in keep]
    missing = int(sum(keep) - sum(rounded))
    for g in sorted(groups, key=lambda g: (-(keep[g] - rounded[g]), g))[:missing]:
        rounded[g] += 1
    return rounded


scores_any = st.one_of(
    st.just(0.0),
    st.floats(0, 10),
    st.sampled_from([1.0, 1.0, 2.0, 1e300, 1e-300, 5e-324, 1e16]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[LayerSize], float, float]:
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 400), min_size=count, max_size=count))
    scores = draw(st.lists(scores_any, min_size=count, max_size=count))
    blocks = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    layers = [layer(f"l{i:02}", n, s, f"b{b}") for i, (n, s, b) in enumerate(zip(sizes, scores, blocks, strict=True))]
    p = draw(st.sampled_from(SPARSITIES))
    return layers, p, draw(st.sampled_from([cap for cap in (0.99, 1.0, round(p + 0.1, 3)) if p <= cap <= 1] or [1.0]))


def feasible(layers: list[LayerSize], p: float, cap: float, **options: Any) -> Allocation | None:
    """None where the rounded-down caps of tiny groups leave too little to cut."""
    try:
        return allocate(layers, sparsity=p, max_sparsity=cap, **options)
    except InfeasibleAllocation:
        groups: dict[str, int] = {}
        for size in layers:
            group = size.name if options.get("granularity") == "layer" else size.block
            groups[group] = groups.get(group, 0) + size.weights
        least = sum(math.ceil((1 - Fraction(str(cap))) * n) for n in groups.values())
        assert least > round((1 - Fraction(str(p))) * sum(groups.values()))
        return None


@settings(max_examples=300, deadline=None)
@given(cases())
def test_matches_the_slow_version_per_layer(case: tuple[list[LayerSize], float, float]) -> None:
    layers, p, cap = case
    allocation = feasible(layers, p, cap, granularity="layer")
    if allocation is None:
        return
    expected = slow([s.weights for s in layers], [s.score or 0.0 for s in layers], str(p), str(cap))
    assert list(kept(allocation).values()) == expected


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(["sum", "mean"]))
def test_matches_the_slow_version_per_block(case: tuple[list[LayerSize], float, float], aggregate: str) -> None:
    layers, p, cap = case
    allocation = feasible(layers, p, cap, aggregate=aggregate)
    if allocation is None:
        return
    names = sorted({s.block for s in layers})
    sizes = [sum(s.weights for s in layers if s.block == b) for b in names]
    scores = [sum(Fraction(s.score or 0.0) for s in layers if s.block == b) for b in names]
    if aggregate == "mean":
        scores = [score / n for score, n in zip(scores, sizes, strict=True)]
    expected = slow(sizes, scores, str(p), str(cap))  # type: ignore[arg-type]
    assert [by_block(allocation)[b][1] for b in names] == expected


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(["block", "layer", "tower", "expert"]), st.booleans())
def test_budget_caps_and_split(case: tuple[list[LayerSize], float, float], granularity: str, uniform: bool) -> None:
    layers, p, cap = case
    try:
        allocation = allocate(layers, sparsity=p, max_sparsity=cap, granularity=granularity, uniform=uniform)
    except InfeasibleAllocation:
        return  # examined in the comparison with the slow version
    total = sum(s.weights for s in layers)
    assert allocation.total_weights == total
    assert total - allocation.zeros == round((1 - Fraction(str(p))) * total)
    groups: dict[str, list[Any]] = {}
    for row in allocation.layers:
        assert 0 <= row.zeros <= row.weights
        of = {"block": row.block, "layer": row.name, "tower": row.tower, "expert": row.block}  # none is in an expert
        key = "all" if uniform else of[granularity]
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        zeros, weights = sum(r.zeros for r in rows), sum(r.weights for r in rows)
        if not uniform:
            assert zeros <= Fraction(str(cap)) * weights
        for row in rows:  # one sparsity a group, to the weight
            assert abs(row.zeros - Fraction(zeros * row.weights, weights)) < 1


@settings(max_examples=150, deadline=None)
@given(cases(), st.randoms(use_true_random=False), st.sampled_from(["sum", "mean"]), st.integers(-20, 20))
def test_order_and_powers_of_two_change_nothing(
    case: tuple[list[LayerSize], float, float], shuffler: random.Random, aggregate: str, power: int
) -> None:
    layers, p, cap = case
    reference = feasible(layers, p, cap, aggregate=aggregate)
    if reference is None:
        return
    shuffled = layers[:]
    shuffler.shuffle(shuffled)
    assert kept(allocate(shuffled, sparsity=p, max_sparsity=cap, aggregate=aggregate)) == kept(reference)
    scaled = [layer(s.name, s.weights, math.ldexp(s.score or 0.0, power), s.block) for s in layers]
    if all(math.isfinite(s.score) and math.ldexp(s.score, -power) == o.score for s, o in zip(scaled, layers)):  # type: ignore  # noqa: B905
        assert kept(allocate(scaled, sparsity=p, max_sparsity=cap, aggregate=aggregate)) == kept(reference)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(1e-6, 1e6))
def test_any_scale_changes_at_most_a_weight(case: tuple[list[LayerSize], float, float], factor: float) -> None:
    layers, p, cap = case
    layers = [layer(s.name, s.weights, min(max(s.score or 0.0, 1e-3), 1e3), s.block) for s in layers]
    reference = feasible(layers, p, cap, granularity="layer")
    if reference is None:
        return
    scaled = [layer(s.name, s.weights, (s.score or 0.0) * factor, s.block) for s in layers]
    other = kept(allocate(scaled, sparsity=p, max_sparsity=cap, granularity="layer"))
    assert all(abs(other[name] - keep) <= 1 for name, keep in kept(reference).items())


@settings(max_examples=200, deadline=None)
@given(cases(), st.floats(0, 100), st.integers(0, 11))
def test_a_higher_score_never_keeps_less(case: tuple[list[LayerSize], float, float], more: float, index: int) -> None:
    layers, p, cap = case
    before = feasible(layers, p, cap)
    if before is None:
        return
    chosen = layers[index % len(layers)]
    raised = [
        layer(s.name, s.weights, (s.score or 0.0) + more if s is chosen and s.score != 1e300 else s.score, s.block)
        for s in layers
    ]
    after = allocate(raised, sparsity=p, max_sparsity=cap)
    assert by_block(after)[chosen.block][1] >= by_block(before)[chosen.block][1]


def test_hand_made_case() -> None:
    # keep 150 of 300; the cap 0.8 keeps 20 each; 90 are dealt 6 : 3 : 1; "a" takes 54 + 20.
    layers = [layer("a", 100, 6.0), layer("b", 100, 3.0), layer("c", 100, 1.0)]
    assert kept(allocate(layers, sparsity=0.5, max_sparsity=0.8)) == {"a": 74, "b": 47, "c": 29}
    # 30 : 1 : 1, so "a" is full at 100, and what it can't take goes to the others in equal parts.
    layers = [layer("a", 100, 30.0), layer("b", 100, 1.0), layer("c", 100, 1.0)]
    assert kept(allocate(layers, sparsity=0.5, max_sparsity=0.9)) == {"a": 100, "b": 25, "c": 25}


def test_default_cap_is_exactly_a_tenth_above() -> None:
    layers = [layer("dead", 1000, 0.0), layer("alive", 9000, 1.0)]
    allocation = allocate(layers, sparsity=0.6)  # 0.6 + 0.1 in floats is below 0.7
    assert allocation.max_sparsity == 0.7
    assert allocation["dead"].zeros == 700
    assert allocate(layers, sparsity=0.95).max_sparsity == 1.0


def test_zero_scores_keep_the_floor_while_others_have_room_then_share_alike() -> None:
    layers = [layer("x", 100, 0.0), layer("y", 100, 0.0), layer("z", 100, 1e-300)]
    assert kept(allocate(layers, sparsity=0.7, max_sparsity=0.9)) == {"x": 10, "y": 10, "z": 70}
    assert kept(allocate(layers, sparsity=0.5, max_sparsity=0.9)) == {"x": 25, "y": 25, "z": 100}
    zero = [layer("x", 100, 0.0), layer("y", 300, 0.0)]
    assert kept(allocate(zero, sparsity=0.5, max_sparsity=1.0)) == {"x": 100, "y": 100}


def test_extreme_scores() -> None:
    layers = [layer("big", 50, 1e300), layer("small", 100, 1e-300), layer("tiny", 100, 5e-324)]
    assert kept(allocate(layers, sparsity=0.5, max_sparsity=0.9)) == {"big": 50, "small": 65, "tiny": 10}


def test_mean_favours_the_small_block() -> None:
    layers = [layer("small", 100, 1.0), layer("large", 900, 1.0)]
    assert kept(allocate(layers, sparsity=0.9, max_sparsity=1.0)) == {"small": 50, "large": 50}
    assert kept(allocate(layers, sparsity=0.9, max_sparsity=1.0, aggregate="mean")) == {"small": 90, "large": 10}
    equal = [layer("a", 500, 1.0), layer("b", 500, 3.0), layer("c", 1000, 3.0)]
    assert kept(allocate(equal, sparsity=0.7, max_sparsity=1.0)) == {"a": 86, "b": 257, "c": 257}
    assert kept(allocate(equal, sparsity=0.7, max_sparsity=1.0, aggregate="mean")) == {"a": 109, "b": 327, "c": 164}


def test_floor_leaves_no_group_denser() -> None:
    layers = [layer("a", 100, 9.0), layer("b", 100, 1.0)]
    assert kept(allocate(layers, sparsity=0.5, max_sparsity=1.0, min_sparsity=0.3)) == {"a": 70, "b": 30}


def test_uniform() -> None:
    layers = [layer("a", 3, None), layer("b", 3, None), layer("c", 4, None)]
    allocation = allocate(layers, sparsity=0.5, uniform=True)
    assert allocation.zeros == 5
    assert all(row.zeros in (1, 2) for row in allocation.layers)
    assert allocate(layers, sparsity=0.0, uniform=True).zeros == 0
    assert allocate(layers, sparsity=1.0, uniform=True).zeros == 10


TOWERS = [
    layer("v0", 101, 1.0, tower="vision", modality="vision"),
    layer("v1", 101, 8.0, tower="vision", modality="vision"),
    layer("e0", 151, 1e3, tower="encoder", modality="language"),
    layer("d0", 151, 1e3, tower="decoder", modality="language"),
    layer("d1", 33, 1e2, tower="decoder", modality="language"),
]


def tower_zeros(allocation: Allocation) -> dict[str, int]:
    return {t: sum(r.zeros for r in allocation.layers if r.tower == t) for t in ("vision", "encoder", "decoder")}


@pytest.mark.parametrize("uniform", [True, False])
def test_budget_per_tower(uniform: bool) -> None:
    allocation = allocate(TOWERS, sparsity=0.5, budget="tower", uniform=uniform)
    assert allocation.total_weights - allocation.zeros == round(537 * 0.5)
    sizes = {"vision": 202, "encoder": 151, "decoder": 184}
    assert all(abs(z - sizes[t] / 2) < 1 for t, z in tower_zeros(allocation).items())
    # A budget of its own is what "tower" is for: globally, vision would be cut to the cap.
    assert tower_zeros(allocate(TOWERS, sparsity=0.5))["vision"] > 112


def test_own_targets_of_towers() -> None:
    allocation = allocate(TOWERS, sparsity=0.5, tower_sparsity={"vision": 0.2})
    zeros = tower_zeros(allocation)
    assert abs(zeros["vision"] - 0.2 * 202) < 1
    assert abs(zeros["encoder"] + zeros["decoder"] - 0.5 * 335) < 1  # the others meet the overall target together
    assert allocation.zeros == 537 - round(Fraction("0.8") * 202 + Fraction("0.5") * 335)
    each = tower_zeros(allocate(TOWERS, sparsity=0.5, budget="tower", tower_sparsity={"vision": 0.2}))
    assert abs(each["encoder"] - 75.5) < 1
    assert abs(each["decoder"] - 92) < 1
    # By modality, with a tower's name going first.
    both = tower_zeros(allocate(TOWERS, sparsity=0.5, tower_sparsity={"language": 0.7, "encoder": 0.1}))
    assert abs(both["encoder"] - 15.1) < 1
    assert abs(both["decoder"] - 0.7 * 184) < 1
    assert abs(both["vision"] - 101) < 1


def test_nm_fixes_the_ratio() -> None:
    layers = [LayerSize("a", "t", "b", 64, None, "", (8, 8)), LayerSize("c", "t", "b", 128, None, "", (8, 16))]
    allocation = allocate(layers, sparsity=0.5, uniform=True, pattern="2:4")
    assert [row.zeros for row in allocation.layers] == [32, 64]
    assert allocate(layers, sparsity=0.75, uniform=True, pattern="2:8").zeros == 144
    thirds = [LayerSize("a", "t", "b", 48, None, "", (4, 12))]
    assert allocate(thirds, sparsity=0.67, uniform=True, pattern="1:3").zeros == 32
    with pytest.raises(InvalidOption, match=r"2:4 fixes the sparsity at 0.5, not 0.6"):
        allocate(layers, sparsity=0.6, uniform=True, pattern="2:4")
    with pytest.raises(InvalidOption, match=r"importance 'uniform'"):
        allocate([layer("a", 64, 1.0)], sparsity=0.5, pattern="2:4")
    with pytest.raises(InvalidOption, match=r"importance 'uniform'"):
        allocate(layers, sparsity=0.5, uniform=True, pattern="2:4", tower_sparsity={"t": 0.4})
    with pytest.raises(InvalidOption, match=r"16:32 does not divide the 8 columns of layer 'a'"):
        allocate(layers, sparsity=0.5, uniform=True, pattern="16:32")
    with pytest.raises(InvalidOption, match=r"4:8 does not divide the 12 columns of layer 'a'"):
        allocate(thirds, sparsity=0.5, uniform=True, pattern="4:8")
    with pytest.raises(InvalidOption, match=r"3:2"):
        allocate(layers, sparsity=0.5, uniform=True, pattern="3:2")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.2}, InvalidOption, "sparsity must be a number from 0 to 1, not 1.2"),
        ({"sparsity": math.nan}, InvalidOption, "sparsity"),
        ({"sparsity": "0.5"}, InvalidOption, "sparsity"),
        ({"max_sparsity": -0.1}, InvalidOption, "max_sparsity"),
        ({"min_sparsity": 2}, InvalidOption, "min_sparsity"),
        ({"max_sparsity": 0.4}, InfeasibleAllocation, "sparsity 0.5 is out of reach.* allow 0 to 0.4;"),
        ({"min_sparsity": 0.55, "max_sparsity": 0.9}, InfeasibleAllocation, "allow 0.55 to 0.9;"),
        ({"min_sparsity": 0.7, "max_sparsity": 0.6}, InfeasibleAllocation, "no sparsity satisfies"),
        ({"uniform": True, "max_sparsity": 0.4}, InfeasibleAllocation, "allow 0 to 0.4"),
        ({"granularity": "blok"}, UnknownName, "did you mean 'block'"),
        ({"aggregate": "median"}, UnknownName, "choose from sum, mean"),
        ({"budget": "local"}, UnknownName, "choose from global, tower"),
        ({"tower_sparsity": {"visoin": 0.5}}, UnknownName, "did you mean 'vision'"),
        ({"tower_sparsity": {"vision": 1.5}}, InvalidOption, "tower_sparsity of 'vision'"),
        ({"tower_sparsity": {"vision": 0.8}, "max_sparsity": 0.6}, InfeasibleAllocation, "0.8 of 'vision' is out"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[EcoflapError], message: str) -> None:
    layers = [
        layer("a", 1000, 1.0, tower="vit", modality="vision"),
        layer("b", 1000, 2.0, tower="llm", modality="language"),
    ]
    with pytest.raises(error, match=message) as caught:
        allocate(layers, **{"sparsity": 0.5, **options})
    assert "\n" not in str(caught.value)


def test_limits_between_which_no_whole_weight_lies() -> None:
    layers = [layer("a", 3, 1.0), layer("b", 1000, 1.0)]
    with pytest.raises(InfeasibleAllocation, match=r"no sparsity satisfies .* 0\.45 and max_sparsity 0\.55"):
        allocate(layers, sparsity=0.5, min_sparsity=0.45, max_sparsity=0.55)
    with pytest.raises(InfeasibleAllocation, match=r"in whole weights of each layer.* allow 0 to 0\.375;"):
        allocate([layer("a", 3, 1.0), layer("b", 5, 1.0)], sparsity=0.5, max_sparsity=0.5, granularity="layer")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (layer("bad", 10, math.nan), NonFiniteLoss, "score of layer 'bad' is nan"),
        (layer("bad", 10, math.inf), NonFiniteLoss, "score of layer 'bad' is inf"),
        (layer("bad", 10, -1.0), InvalidOption, "score of layer 'bad' is -1.0"),
        (layer("bad", 10, None), InvalidOption, "'bad' has no score"),
        (layer("bad", 0, 1.0), InvalidOption, "'bad' has 0 weights"),
        (layer("a", 10, 1.0), InvalidOption, "'a' appears 2 times"),
    ],
)
def test_bad_layers(bad: LayerSize, error: type[EcoflapError], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate([layer("a", 10, 1.0), bad], sparsity=0.5)


def test_no_layers() -> None:
    with pytest.raises(InvalidOption, match="no layers"):
        allocate([], sparsity=0.5)


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_instantaneous(aggregate: str) -> None:
    rng = random.Random(0)
    layers = [
        layer(f"{block}.{i}", rng.randint(1, 4_000_000), 10 ** rng.uniform(-40, 40), f"b{block}")
        for block in range(1000)
        for i in range(5)
    ]
    start = time.process_time()  # of this process: the machine may do other work
    allocation = allocate(layers, sparsity=0.6, aggregate=aggregate)
    assert time.process_time() - start < 2
    assert allocation.total_weights > 9e9
    assert allocation.total_weights - allocation.zeros == round(Fraction("0.4") * allocation.total_weights)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=9, max_size=9), st.floats(0.2, 0.7))
def test_the_matrices_of_an_expert_share_one_sparsity(scores: list[float], sparsity: float) -> None:
    """Two blocks, each with attention and two experts of two matrices; all others of a block are a group, too."""
    places = [("a", ""), ("a", "a.experts[0]"), ("a", "a.experts[0]"), ("a", "a.experts[1]"), ("a", "a.experts[1]"),
              ("b", ""), ("b", "b.experts[0]"), ("b", "b.experts[0]"), ("b", "b.experts[1]")]  # fmt: skip
    layers = [
        LayerSize(f"{block}.{number}", "t", block, 1000 + 37 * number, score, "", None, expert)
        for number, ((block, expert), score) in enumerate(zip(places, scores, strict=True))
    ]
    sparsity = round(sparsity, 2)
    by_expert = allocate(layers, sparsity=sparsity, max_sparsity=1.0, granularity="expert")
    as_blocks = [replace(one, block=one.expert or one.block, expert="") for one in layers]
    assert by_expert.zeros == round(sparsity * by_expert.total_weights)
    blocks = allocate(as_blocks, sparsity=sparsity, max_sparsity=1.0, granularity="block")
    assert [row.zeros for row in by_expert.layers] == [row.zeros for row in blocks.layers]
