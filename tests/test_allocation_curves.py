"""The rule of measured curves: against an isotonic regression and an optimum found by trying everything."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Command
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoflap.allocation import LayerSize, allocate
from ecoflap.allocation.curves import Curve, LeastLoss
from ecoflap.allocation.groups import Group
from ecoflap.errors import InfeasibleAllocation, InvalidOption
from ecoflap.importance.scores import Importance, Score
from ecoflap.model.parts import Layer

LOSSES = st.floats(-1.0, 10.0, allow_nan=False, width=16)


def isotonic(losses: tuple[float, ...]) -> tuple[float, ...]:
    """The least squares fit that never falls: the best of all ways to cut the sequence into runs of one value."""
    n, best = len(losses), None
    for cuts in itertools.product((False, True), repeat=n - 1):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        fit: list[float] = []
        for a, b in itertools.pairwise(starts):
            fit += [math.fsum(losses[a:b]) / (b - a)] * (b - a)
        if all(x <= y + 1e-12 for x, y in itertools.pairwise(fit)):
            error = math.fsum((x - y) ** 2 for x, y in zip(fit, losses, strict=True))
            if best is None or error < best[0]:
                best = error, fit
    assert best is not None
    return tuple(best[1])


@settings(max_examples=150, deadline=None)
@given(st.lists(LOSSES, min_size=1, max_size=8))
def test_monotone_is_the_isotonic_regression_cut_off_at_zero(losses: list[float]) -> None:
    levels = tuple((i + 1) / len(losses) for i in range(len(losses)))
    found = Curve(levels, tuple(losses)).monotone()
    assert found.levels == levels
    assert found.losses == pytest.approx([max(0.0, value) for value in isotonic(tuple(losses))], abs=1e-9)
    assert found.monotone().losses == pytest.approx(found.losses, abs=1e-12)


def loss_at(curve: Curve, x: Fraction | float, weights: int) -> float:
    """The curve read at x weights cut of so many, straight between its levels, and on with the last slope."""
    xs = [0.0, *(level * weights for level in curve.levels)]
    ys = [0.0, *curve.losses]
    place = max(1, sum(x > point for point in xs[1:-1]) + 1)
    slope = (ys[place] - ys[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + slope * (float(x) - xs[place - 1])


def group(number: int, weights: int, curve: Any, least: int = 0, most: int | None = None) -> Group:
    return Group(("t", f"b{number}"), (), weights, least, weights if most is None else most, Fraction(0), curve)


@st.composite
def convex(draw: st.DrawFn) -> Curve:
    """Slopes that rise, at levels that need not be whole weights."""
    count = draw(st.integers(1, 4))
    steps = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    whole = sum(steps) + draw(st.integers(0, 3))
    slopes = sorted(draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))
    levels = tuple(total / whole for total in itertools.accumulate(steps))
    losses = tuple(itertools.accumulate(step * slope / 7 for step, slope in zip(steps, slopes, strict=True)))
    return Curve(levels, losses)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Group], int]:
    groups = []
    for number in range(draw(st.integers(1, 3))):
        weights = draw(st.integers(1, 12))
        least = draw(st.integers(0, weights))
        groups.append(group(number, weights, draw(convex()), least, draw(st.integers(least, weights))))
    return groups, draw(st.integers(sum(g.least for g in groups), sum(g.most for g in groups)))


def total(groups: list[Group], kept: tuple[int, ...] | list[int]) -> float:
    return math.fsum(loss_at(g.data, g.weights - k, g.weights) for g, k in zip(groups, kept, strict=True))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_split_in_whole_weights_costs_less(problem: tuple[list[Group], int]) -> None:
    groups, keep = problem
    kept = LeastLoss()(groups, keep, Fraction(1, 2))
    assert sum(kept) == keep
    assert all(g.least <= k <= g.most for g, k in zip(groups, kept, strict=True))
    splits = itertools.product(*(range(g.least, g.most + 1) for g in groups))
    best = min(total(groups, split) for split in splits if sum(split) == keep)
    assert total(groups, kept) == pytest.approx(best, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.randoms())
def test_the_order_of_the_groups_does_not_matter(problem: tuple[list[Group], int], random: Any) -> None:
    groups, keep = problem
    kept = {g.name: k for g, k in zip(groups, LeastLoss()(groups, keep, Fraction(1, 2)), strict=True)}
    shuffled = random.sample(groups, len(groups))
    again = {g.name: k for g, k in zip(shuffled, LeastLoss()(shuffled, keep, Fraction(1, 2)), strict=True)}
    assert again == kept


def test_a_curve_that_is_not_convex_counts_by_its_hull() -> None:
    # a costs nothing more once it has lost half: dear at first, cheap on the whole.
    a = group(0, 10, Curve((0.5, 1.0), (5.0, 5.0)))
    b = group(1, 10, Curve((1.0,), (6.0,)))
    assert LeastLoss()([a, b], 10, Fraction(1, 2)) == [0, 10]  # 5 against 6, and against 5 + 3 at half each
    # Where a may lose but half, b is the cheaper one.
    capped = group(0, 10, a.data, least=5)
    assert LeastLoss()([capped, b], 10, Fraction(1, 2)) == [10, 0]


def test_noise_below_zero_costs_nothing_and_beyond_the_last_level_the_last_slope_goes_on() -> None:
    free = group(0, 10, Curve((0.5,), (-3.0,)))
    dear = group(1, 10, Curve((0.5,), (1.0,)))
    assert LeastLoss()([free, dear], 10, Fraction(1, 2)) == [0, 10]
    steep = group(1, 10, Curve((0.5, 0.6), (1.0, 3.0)))
    mild = group(0, 10, Curve((0.5,), (4.0,)))  # 0.8 a weight, also from 5 to 10
    assert LeastLoss()([mild, steep], 4, Fraction(8, 10)) == [0, 4]  # 0.2 a weight up to 5, then 2.0


def sizes(granularity: str = "block") -> list[LayerSize]:
    return [
        LayerSize(f"{tower}.{block}.{name}", tower, f"{tower}.{block}", weights, None, tower)
        for tower in ("vision", "language")
        for block in range(3)
        for name, weights in (("q", 31), ("up", 64 + block))
    ]


def curves(names: list[str], seed: int = 0) -> dict[str, Curve]:
    generator = torch.Generator().manual_seed(seed)
    levels = tuple(i / 10 for i in range(1, 11))
    return {n: Curve(levels, tuple(torch.rand(10, generator=generator).cumsum(0).tolist())) for n in names}


@pytest.mark.parametrize("granularity", ["block", "layer", "tower"])
@pytest.mark.parametrize("budget", ["global", "tower"])
def test_allocate_meets_budget_cap_and_floor(granularity: str, budget: str) -> None:
    layers = sizes()
    names = {"block": lambda s: s.block, "layer": lambda s: s.name, "tower": lambda s: s.tower}[granularity]
    data = curves(sorted({names(size) for size in layers}))
    found = allocate(
        layers, sparsity=0.55, max_sparsity=0.8, min_sparsity=0.3, granularity=granularity, budget=budget,
        rule="curves", data=data,
    )  # fmt: skip
    whole = sum(size.weights for size in layers)
    assert whole - found.zeros == round(Fraction(45, 100) * whole)
    for tower in ("vision", "language") if budget == "tower" else ():
        rows = [row for row in found.layers if row.tower == tower]
        assert abs(sum(r.zeros for r in rows) - 0.55 * sum(r.weights for r in rows)) < 1
    for name in {names(size) for size in layers}:
        mine = [row for row, size in zip(found.layers, layers, strict=True) if names(size) == name]
        assert 0.3 <= sum(r.zeros for r in mine) / sum(r.weights for r in mine) <= 0.8
    assert len({row.zeros / row.weights > 0.55 for row in found.layers}) == 2 or granularity == "tower"


def test_without_a_cap_a_group_may_lose_everything() -> None:
    layers = sizes()
    data = {size.block: Curve((1.0,), (1.0 if size.tower == "vision" else 100.0,)) for size in layers}
    found = allocate(layers, sparsity=0.5, rule="curves", data=data)
    assert found.max_sparsity == 1.0
    assert [row.zeros / row.weights for row in found.layers if row.tower == "vision"] == [1.0] * 6
    with pytest.raises(InfeasibleAllocation, match="out of reach"):
        allocate(layers, sparsity=0.5, max_sparsity=0.4, rule="curves", data=data)


def test_no_curve_no_spread() -> None:
    data = curves(sorted({size.block for size in sizes()}))
    with pytest.raises(InvalidOption, match=r"needs a measured curve of 'vision\.0\.q'.*sensitivity.*granularity"):
        allocate(sizes(), sparsity=0.5, granularity="layer", rule="curves", data=data)
    with pytest.raises(InvalidOption, match="needs a measured curve"):
        allocate(sizes(), sparsity=0.5, rule="curves")
    with pytest.raises(InvalidOption, match=r"spread 0\.2: rule 'curves' has no spread"):
        allocate(sizes(), sparsity=0.5, rule="curves", data=data, spread=0.2)


@pytest.mark.parametrize(
    ("levels", "losses", "words"),
    [
        ((), (), "0 levels"),
        ((0.5,), (1.0, 2.0), "1 levels and 2 losses"),
        ((0.0, 0.5), (0.0, 1.0), "above 0"),
        ((0.5, 0.5), (0.0, 1.0), "must rise"),
        ((0.7, 0.5), (0.0, 1.0), "must rise"),
        ((0.5, 1.1), (0.0, 1.0), "up to 1"),
        ((math.nan,), (0.0,), "must rise"),
        ((0.3, math.nan, 0.5), (0.0, 0.0, 0.0), "must rise"),
        ((0.5,), (math.nan,), "finite"),
        ((0.5,), (math.inf,), "finite"),
    ],
)
def test_what_is_no_curve(levels: tuple[float, ...], losses: tuple[float, ...], words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        Curve(levels, losses)


@settings(max_examples=50, deadline=None)
@given(convex())
def test_a_curve_goes_through_json_to_the_bit(curve: Curve) -> None:
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


@pytest.mark.parametrize("data", [None, [], 3, {}, {"levels": [0.5]}, {"levels": 1, "losses": 2},
                                  {"levels": ["a"], "losses": [1]}, {"levels": [0.5], "losses": [None]}])  # fmt: skip
def test_what_is_read_must_be_a_curve(data: Any) -> None:
    with pytest.raises(InvalidOption, match="'levels' and 'losses'"):
        Curve.from_json(data)


def importance() -> Importance:
    layers = tuple(
        Layer(f"m.{block}.fc.weight", f"m.{block}.fc", f"m.{block}", "m", "language", (8, 10)) for block in range(3)
    )
    settings = {"rule": "curves", "scope": "block"}
    data = {f"m.{block}": Curve((0.5, 1.0), (1.0 + block, 6.0 + 4 * block)) for block in range(3)}
    return Importance("sensitivity", settings, layers, {layer.name: Score(1.0, 0.0, 1) for layer in layers}, data)


def test_an_importance_keeps_its_curves(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    path.write_text(json.dumps(importance().to_json()), "utf-8")
    assert Importance.load(path) == importance()
    broken = importance().to_json()
    broken["curves"]["m.1"]["levels"] = [0.5, 0.4]
    path.write_text(json.dumps(broken), "utf-8")
    with pytest.raises(InvalidOption, match="must rise"):
        Importance.load(path)


def test_the_command_allocates_from_curves_in_a_file(run: Command, tmp_path: Path) -> None:
    (tmp_path / "importance.json").write_text(json.dumps(importance().to_json()), "utf-8")
    run("allocate", "importance.json", "--sparsity", 0.5, "-o", "allocation.json").well()
    data = json.loads((tmp_path / "allocation.json").read_text("utf-8"))
    # Forty weights of each block cost 1, 2 and 3, the forty others 5, 8 and 11: the three first halves go.
    assert [row["zeros"] for row in data["layers"]] == [40, 40, 40]
    assert data["rule"] == "curves"
    run("allocate", "importance.json", "--sparsity", 0.75, "--max-sparsity", 0.9, "-o", "more.json").well()
    more = json.loads((tmp_path / "more.json").read_text("utf-8"))
    assert [row["zeros"] for row in more["layers"]] == [72, 68, 40]
    bad = ("allocate", "importance.json", "--sparsity", 0.5, "-o", "bad.json")
    run(*bad, "--granularity", "layer").refused("granularity")
    run(*bad, "--spread", 0.1).refused("spread 0.1")
    data = importance().to_json()
    data["curves"]["m.1"] = 7
    (tmp_path / "broken.json").write_text(json.dumps(data), "utf-8")
    run("allocate", "broken.json", "--sparsity", 0.5, "-o", "bad.json").refused("'levels' and 'losses'")
