"""Adaptive sampling: the rule against its formula, the turns, and what they may not depend on."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import Journal
from picos import FAMILIES

from ecoflap import measure_importance
from ecoflap.errors import InvalidOption
from ecoflap.importance.stopping import LEAST, Stopping, rounds, turns

VALUES = st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6), max_size=30)


@given(VALUES, st.floats(0.01, 0.99), st.sampled_from([0.0, 0.755]), st.randoms(use_true_random=False))
def test_enough_is_the_formula_whatever_the_order(
    values: list[float], error: float, scatter: float, order: random.Random
) -> None:
    rule = Stopping(error, scatter)
    sizes = [abs(value) for value in values]
    if len(values) < LEAST:
        expected = False
    elif not any(values):
        expected = True
    else:
        mean, measured = statistics.fmean(sizes), statistics.stdev(sizes) / math.sqrt(len(sizes))
        if math.isclose(measured, error * mean, rel_tol=1e-9):
            return  # rounding decides
        expected = measured <= error * mean and len(sizes) * (1 + 1e-12) >= (scatter / error) ** 2
    shuffled = order.sample(values, len(values))
    assert rule.is_precise_enough(values) == rule.is_precise_enough(shuffled) == expected


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_rounds_hold_each_piece_once_and_see_all_batches_first(
    batches: int, draws: int, layers: int, order: random.Random
) -> None:
    pieces = [((f"w{i}", b, d),) for b in range(batches) for i in range(layers) for d in range(draws)]
    found = rounds(order.sample(pieces, len(pieces)))
    assert sorted(piece for group in found for piece in group) == sorted(pieces)
    assert [{(d, b) for ((_, b, d),) in group} for group in found] == [
        {(d, b)} for d in range(draws) for b in range(batches)
    ]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.4, 0.7]), st.sampled_from([0.0, 0.755]))
def test_turns_sample_each_layer_until_the_rule_says_enough(seed: int, error: float, scatter: float) -> None:
    names, batches, draws = ("a", "b", "zero"), 3, 6
    source = random.Random(seed)
    value = {
        (n, b, d): 0.0 if n == "zero" else source.gauss(1 if n == "a" else 0, 1)
        for n in names for b in range(batches) for d in range(draws)
    }  # fmt: skip
    rule = Stopping(error, scatter)
    expected = {}
    for name in names:  # the rule by itself, layer by layer
        sequence = [(name, b, d) for d in range(draws) for b in range(batches)]
        count = next(
            (n for n in range(len(sequence)) if rule.is_precise_enough([value[key] for key in sequence[:n]])),
            len(sequence),
        )
        expected[name] = set(sequence[:count])
    known = {}
    passed = 0
    for wanted, left_out in turns([(key,) for key in value], known, rule):
        passed += left_out
        for (key,) in wanted:
            known[key] = value[key]
    assert passed == len(value) - len(known)
    assert {name: {key for key in known if key[0] == name} for name in names} == expected
    assert len(expected["zero"]) == LEAST


def test_pieces_go_on_while_any_of_their_layers_needs_more() -> None:
    value = {("steady", b, 0): 1.0 for b in range(8)} | {("wild", b, 0): float(b % 2) * 9 + 1 for b in range(8)}
    known: dict[tuple[str, int, int], float] = {}
    for wanted, _ in turns([(("steady", b, 0), ("wild", b, 0)) for b in range(8)], known, Stopping(0.01)):
        known |= {key: value[key] for piece in wanted for key in piece}
    assert known == value


@pytest.mark.parametrize(
    ("importance", "options"),
    [
        ("zeroth-order", {"draws": 4}),
        ("zeroth-order", {"draws": 4, "probe": "block"}),
        ("gradient-norm", {}),
    ],
)
def test_an_interrupted_measurement_takes_the_same_turns(importance: str, options: dict[str, object]) -> None:
    family = FAMILIES["clip"]
    model, batches = family.build(), family.batches(5, 1)
    given = {"error": 0.35, **options}
    whole = measure_importance(model, batches, importance, **given)
    counts = {score.n for score in whole.scores.values()}
    assert min(counts) == LEAST or importance == "gradient-norm"
    assert max(counts) <= 5 * int(str(options.get("draws", 1)))
    full = sum(score.n for score in whole.scores.values())
    assert full < len(whole.layers) * 5 * int(str(options.get("draws", 1))) or importance == "gradient-norm"
    for stop_after in (1, full // 3, full - 1):
        journal = Journal(stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            measure_importance(model, batches, importance, journal=journal, **given)
        mixed = Journal(random.Random(stop_after).sample(journal.kept, len(journal.kept)))
        again = measure_importance(model, batches, importance, journal=mixed, **given)
        assert again.scores == whole.scores
        assert len(mixed.kept) == full


def test_what_is_sampled_has_the_values_of_a_full_measurement() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(4, 2)
    everything, some = Journal(), Journal()
    measure_importance(model, batches, "zeroth-order", journal=everything, draws=4)
    found = measure_importance(model, batches, "zeroth-order", journal=some, draws=4, error=0.5)
    assert set(some.kept) <= set(everything.kept)
    assert found.settings["error"] == 0.5
    for score in found.scores.values():
        assert score.n == 8 or score.stderr <= 0.5 * score.score


def test_a_budget_that_cannot_do_is_told(recwarn: pytest.WarningsRecorder) -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 1)
    found = measure_importance(model, batches, "zeroth-order", error=0.1)
    (warning,) = [str(w.message) for w in recwarn if "importance_error" in str(w.message)]
    assert "at least 58 estimates" in warning
    assert "2 batches × 1 draw" in warning
    assert {score.n for score in found.scores.values()} == {2}


def test_errors_out_of_range_and_measures_that_are_not_sampled() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    for error in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InvalidOption, match="importance_error"):
            measure_importance(model, batches, "zeroth-order", error=error)
    with pytest.raises(InvalidOption, match="owl is not sampled"):
        measure_importance(model, batches, "owl", error=0.1)
