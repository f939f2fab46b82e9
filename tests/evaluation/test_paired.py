"""Paired differences against brute force: all sign patterns, resampled perplexities, formulas written out."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import Paired, Samples, paired, sign_test
from ecoflap.evaluation.task import Measured, measured


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


def of(scores: list[float], **more: Any) -> Samples:
    return Samples(list(scores), list(range(len(scores))), **more)


def difference(model: Samples, other: Samples) -> Paired:
    found = paired([model], [other])
    assert found is not None
    return found


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=40))
def test_scores(pairs: list[tuple[float, float]]) -> None:
    one, two = (list(column) for column in zip(*pairs, strict=True))
    found = difference(of(one), of(two))
    gaps = [a - b for a, b in pairs]
    assert found.difference == pytest.approx(statistics.fmean(one) - statistics.fmean(two), abs=1e-12)
    assert found.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)), abs=1e-9)
    assert (found.better, found.worse, found.n) == (
        sum(a > b for a, b in pairs),
        sum(a < b for a, b in pairs),
        len(gaps),
    )
    back = difference(of(two), of(one))
    assert (back.difference, back.better, back.worse, back.p) == (-found.difference, found.worse, found.better, found.p)


def jackknifed(value: Callable[[Samples], float], one: Samples, two: Samples) -> float:
    n = len(one.scores)
    rest = [[row for row in range(n) if row != left_out] for left_out in range(n)]
    found = [value(one.taken(rows)) - value(two.taken(rows)) for rows in rest]
    mean = statistics.fmean(found)
    return math.sqrt((n - 1) / n * sum((each - mean) ** 2 for each in found))


@pytest.mark.parametrize("equal", [True, False])
def test_the_error_of_perplexities_is_that_of_the_jackknife(equal: bool) -> None:
    """Of windows, and of answers of different lengths, which weigh as many tokens as they have."""
    choose = random.Random(3)
    tokens = [1] * 400 if equal else [choose.randint(1, 9) for _ in range(400)]
    dense = of([choose.gauss(3.0, 0.3) for _ in tokens], tokens=tokens)
    pruned = of([loss + choose.gauss(0.2, 0.05) for loss in dense.scores], tokens=tokens)
    found = difference(pruned, dense)

    def value(model: Samples) -> float:
        total = sum(loss * count for loss, count in zip(model.scores, model.tokens, strict=True))
        return math.exp(total / sum(model.tokens))

    assert found.difference == pytest.approx(value(pruned) - value(dense))
    assert found.stderr == pytest.approx(jackknifed(value, pruned, dense), rel=0.01)
    assert found.worse > found.better  # a higher loss is worse
    if equal:
        alone = [math.exp(statistics.fmean(m.scores)) * statistics.stdev(m.scores) / 20 for m in (dense, pruned)]
        assert found.stderr is not None
        assert found.stderr < math.hypot(*alone) / 3  # what pairing is for


def test_groups_are_paired_by_themselves() -> None:
    choose = random.Random(5)
    kinds = [choose.choice(("colour", "count", None)) for _ in range(60)]
    one, two = ([float(choose.random() < share) for _ in kinds] for share in (0.8, 0.5))
    found = difference(of(one, kinds=kinds), of(two, kinds=kinds))
    assert set(found.groups) == {"colour", "count"}
    for kind, group in found.groups.items():
        gaps = [a - b for a, b, own in zip(one, two, kinds, strict=True) if own == kind]
        assert group.difference == pytest.approx(statistics.fmean(gaps))
        assert group.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(len(gaps)))
        assert (group.n, group.better, group.worse) == (len(gaps), gaps.count(1.0), gaps.count(-1.0))
    written = found.to_json()
    assert written["groups"]["count"]["n"] == kinds.count("count")
    assert "groups" not in written["groups"]["count"]


def test_the_models_of_several_seeds_are_averaged() -> None:
    seeds = [of([1.0, 0.0, 1.0, 0.0]), of([1.0, 1.0, 0.0, 0.0])]
    found = paired(seeds, [of([0.0, 0.5, 1.0, 0.0])])
    assert found is not None
    gaps = [1.0, 0.0, -0.5, 0.0]
    assert found.difference == pytest.approx(0.125)
    assert found.stderr == pytest.approx(statistics.stdev(gaps) / 2)
    assert (found.better, found.worse) == (1, 1)
    tokens = [2, 3]
    losses = [of([1.0, 2.0], tokens=tokens), of([2.0, 2.0], tokens=tokens)]
    text = paired(losses, [of([1.0, 1.0], tokens=tokens)])
    assert text is not None
    assert text.difference == pytest.approx((math.exp(8 / 5) + math.exp(2)) / 2 - math.e)


def test_what_is_not_of_the_same_samples_is_not_paired() -> None:
    one, two = of([1.0, 0.0, 1.0]), Samples([1.0, 1.0, 0.0], [2, 0, 1])
    found = difference(one, two)
    assert (found.difference, found.better, found.worse) == (0.0, 0, 0)  # the same answers in another order
    assert paired([one], [of([1.0, 0.0])]) is None
    assert paired([one], [Samples([1.0, 0.0, 1.0], [1, 2, 3])]) is None
    assert paired([one], [of([1.0, 0.0, 1.0], tokens=[1, 1, 1])]) is None
    assert paired([of([1.0], tokens=[2])], [of([1.0], tokens=[3])]) is None  # texts of other lengths
    assert paired([one], []) is None
    assert paired([of([])], [of([])]) is None
    assert difference(of([1.0]), of([0.0])).stderr is None


def result(value: float, **more: Any) -> TaskResult:
    return TaskResult("vqa", "accuracy", value, None, 3, **more)


def test_samples_of_a_result() -> None:
    rows = [{"index": 4 - i, "score": float(i == 1), "kind": "how" if i else None} for i in range(3)]
    found = Samples.of(result(1 / 3, predictions=rows))
    assert found == Samples([0.0, 1.0, 0.0], [4, 3, 2], [None, "how", "how"])
    assert Samples.of(result(0.9, predictions=rows)) is None  # the value is of another metric
    assert Samples.of(result(1 / 3, predictions=[*rows[:2], {"index": 1}])) is None
    assert Samples.of(result(1 / 3)) is None
    windows = Samples.of(result(math.exp(1.5), losses=[1.0, 2.0]))
    assert windows == Samples([1.0, 2.0], [0, 1], [], [1, 1])
    assert windows == Samples(**windows.to_json())
    answers = Samples.of(result(math.exp(1.25), losses=[1.0, 2.0], tokens=[3, 1], kinds=["a", "b"]))
    assert answers == Samples([1.0, 2.0], [0, 1], ["a", "b"], [3, 1])


def test_further_metrics_are_paired_by_themselves() -> None:
    """Also those of other samples (five captions of three pictures); one that is no mean of its scores has none."""
    captions = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0]]
    answers = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    found = []
    for own, of_captions in zip(answers, captions, strict=True):
        others = {"IR@1": measured(of_captions), "best": Measured(max(own), None, own), "whole": Measured(0.5)}
        rows = [{"index": row, "score": score} for row, score in enumerate(own)]
        found.append(Samples.of(result(statistics.fmean(own), predictions=rows, others=others)))
    one, two = found
    assert one is not None
    assert two is not None
    assert one == Samples(**one.to_json())
    assert one.others == {"IR@1": captions[0]}
    pair = difference(one, two)
    assert set(pair.others) == {"IR@1"}
    gaps = [1.0, 0.0, -1.0, 1.0, 0.0]
    further = pair.others["IR@1"]
    assert further.difference == pytest.approx(statistics.fmean(gaps))
    assert further.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(5))
    assert (further.n, further.better, further.worse) == (5, 2, 1)
    assert pair.to_json()["others"]["IR@1"] == further.to_json()
    assert "others" not in further.to_json()
    assert not difference(one, of(answers[1])).others  # only one model has it


def test_a_task_without_samples_has_no_pair() -> None:
    one = Samples(scores=[1.0], index=[0], kinds=[None])
    assert paired([], []) is None
    assert paired([one], []) is None
    assert paired([], [one]) is None
