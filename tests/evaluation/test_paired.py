"""Paired differences against brute force: all sign patterns, resampled perplexities, formulas written out."""

from __future__ import annotations

import math
import random
import statistics
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.evaluation.paired import paired, paired_records, sign_test


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 0), (0, 4), (2, 5), (6, 6), (7, 3)])
def test_the_sign_test_counts_all_patterns(better: int, worse: int) -> None:
    n = better + worse
    gap = abs(better - worse)
    extreme = sum(abs(2 * sum(signs) - n) >= gap for signs in product((0, 1), repeat=n))
    assert sign_test(better, worse) == pytest.approx(extreme / 2**n)


def test_the_sign_test_of_many_samples() -> None:
    # The normal approximation with a correction for continuity is good here to the third digit.
    for better, worse in [(5000, 5000), (5100, 4900), (4800, 5200)]:
        z = max(abs(better - worse) - 1, 0) / math.sqrt(better + worse)
        assert sign_test(better, worse) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=1e-3)
    assert sign_test(100_000, 0) == 0.0


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=40))
def test_scores(pairs: list[tuple[float, float]]) -> None:
    one, two = zip(*pairs, strict=True)
    found = paired(one, two)
    gaps = [a - b for a, b in pairs]
    assert found.difference == pytest.approx(statistics.fmean(one) - statistics.fmean(two), abs=1e-12)
    assert found.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)), abs=1e-9)
    assert (found.better, found.worse, found.n) == (
        sum(a > b for a, b in pairs),
        sum(a < b for a, b in pairs),
        len(gaps),
    )
    back = paired(two, one)
    assert (back.difference, back.better, back.worse, back.p) == (-found.difference, found.worse, found.better, found.p)


def test_the_error_of_perplexities_is_that_of_the_jackknife() -> None:
    choose = random.Random(3)
    dense = [choose.gauss(3.0, 0.3) for _ in range(400)]
    pruned = [loss + choose.gauss(0.2, 0.05) for loss in dense]
    found = paired(pruned, dense, perplexity=True)
    value = lambda losses: math.exp(statistics.fmean(losses))  # noqa: E731
    assert found.difference == pytest.approx(value(pruned) - value(dense))
    left_out = [value(pruned[:i] + pruned[i + 1 :]) - value(dense[:i] + dense[i + 1 :]) for i in range(400)]
    mean = statistics.fmean(left_out)
    jackknife = math.sqrt(399 / 400 * sum((one - mean) ** 2 for one in left_out))
    assert found.stderr == pytest.approx(jackknife, rel=0.01)
    assert found.worse > found.better  # a higher loss is worse
    alone = [math.exp(statistics.fmean(l)) * statistics.stdev(l) / 20 for l in (dense, pruned)]  # noqa: E741
    assert found.stderr is not None
    assert found.stderr < math.hypot(*alone) / 3  # what pairing is for


def test_records_of_a_run() -> None:
    rows = [{"index": i, "score": float(i % 2)} for i in range(6)]
    right = [{"index": i, "score": 1.0} for i in reversed(range(6))]
    found = paired_records({"answers": right}, {"answers": rows}, 1.0, 0.5)
    assert found is not None
    assert (found.difference, found.better, found.worse, found.p) == (0.5, 3, 0, 0.25)
    assert paired_records({"answers": right}, {"answers": rows}, 0.9, 0.5) is None  # the value is of another metric
    assert paired_records({"answers": right[1:]}, {"answers": rows}, 1.0, 0.5) is None
    assert paired_records({"answers": None}, {"answers": rows}, 1.0, 0.5) is None
    losses = paired_records({"losses": [1.0, 2.0]}, {"losses": [1.0, 1.0]}, math.exp(1.5), math.e)
    assert losses is not None
    assert (losses.better, losses.worse) == (0, 1)
    with pytest.raises(ValueError, match="can't be paired"):
        paired([], [])
