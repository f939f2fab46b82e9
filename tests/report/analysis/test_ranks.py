"""Spearman's correlation against its textbook forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.report.analysis.agreement import ranks, spearman

values = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=30)


@given(values)
def test_ranks_count_the_smaller_ones_and_half_of_the_equal_ones(found: list[float]) -> None:
    expected = [sum(b < a for b in found) + (sum(b == a for b in found) + 1) / 2 for a in found]
    assert ranks(found).tolist() == expected


@given(st.data())
def test_correlation_of_ranks(data: st.DataObject) -> None:
    first = data.draw(values)
    second = data.draw(st.lists(st.integers(-5, 5).map(float), min_size=len(first), max_size=len(first)))
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        a, b = ([sum(y < x for y in v) + sum(y == x for y in v) / 2 for x in v] for v in (first, second))
        assert found == pytest.approx(float(np.corrcoef(a, b)[0, 1]), abs=1e-12)
        assert spearman(first, [-x for x in second]) == pytest.approx(-found, abs=1e-12)


@given(st.permutations(range(8)))
def test_formula_without_ties(order: list[int]) -> None:
    squares = sum((place - value) ** 2 for place, value in enumerate(order))
    assert spearman(range(8), order) == pytest.approx(1 - 6 * squares / (8 * 63), abs=1e-12)
    # Only the order counts.
    assert spearman(range(8), [2.0**value for value in order]) == spearman(range(8), order)


def test_lengths() -> None:
    assert spearman([1.0], [2.0]) is None
    assert spearman([], []) is None
    with pytest.raises(ValueError, match="2 values against 1"):
        spearman([1.0, 2.0], [1.0])
