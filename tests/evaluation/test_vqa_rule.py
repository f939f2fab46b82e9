import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.evaluation.task import mean_and_stderr
from ecoflap.evaluation.vqa import exact_match, normalize, plain_match, soft_accuracy


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("Yes", "yes"),
        ("  the Red   car\n", "red car"),
        ("a dog, and an owl", "dog and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("It is.", "it is"),
        ("dont know", "don't know"),
        ("don't know!", "don't know"),
        ("well", "well"),
        ("its", "its"),
        ("t-shirt", "t shirt"),
        ("", ""),
    ],
)
def test_normalize(said: str, normal: str) -> None:
    assert normalize(said) == normal


def test_exact_match() -> None:
    assert exact_match("The Circle.", "circle") == 1.0
    assert exact_match("circles", "circle") == 0.0


def test_plain_match() -> None:
    assert plain_match(" Red Car\n", "red car") == 1.0
    assert [plain_match(said, "red car") for said in ("the red car", "red car.", "red  car", "red")] == [0.0] * 4


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Worked by hand for 10 annotators: of the 10 subsets of 9, `agreeing` lack one of those who agree.
    [(0, 0.0), (1, 9 / 10 / 3), (2, (2 * 1 + 8 * 2) / 3 / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (10, 1.0)],
)
def test_soft_accuracy_by_hand(agreeing: int, accuracy: float) -> None:
    answers = ["Two"] * agreeing + [f"other{i}" for i in range(10 - agreeing)]
    assert soft_accuracy("2", answers) == pytest.approx(accuracy)


@given(st.lists(st.sampled_from(["yes", "no", "maybe"]), min_size=2, max_size=11), st.sampled_from(["yes", "no", "x"]))
def test_soft_accuracy_is_the_mean_over_subsets(answers: list[str], said: str) -> None:
    subsets = list(itertools.combinations(answers, len(answers) - 1))
    want = statistics.fmean(min(1.0, sum(a == said for a in subset) / 3) for subset in subsets)
    assert soft_accuracy(said, answers) == pytest.approx(want)


def test_one_annotator_is_exact_match() -> None:
    assert soft_accuracy("red", ["Red"]) == 1.0
    assert soft_accuracy("red", ["blue"]) == 0.0


def test_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.3]
    mean, error = mean_and_stderr(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_and_stderr([0.5]) == (0.5, None)
