"""Patterns against sorting in Python: which weights go, how many, and in which order ties are broken."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Unstructured, parse_pattern, sparsity_of_pattern
from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.pruning.masks import _kth_lowest, gradual_mask, lowest_by_counts, lowest_mask, row_quotas

ROW, MATRIX = Unstructured("row"), Unstructured("matrix")


def slow_row(scores: list[list[float]], zeros: int) -> list[list[bool]]:
    """One zero at a time: always in a row that has the fewest, of these the one whose next-lowest score is lowest."""
    order = [sorted(range(len(row)), key=lambda j, row=row: (row[j], j)) for row in scores]
    count = [0] * len(scores)
    for _ in range(zeros):
        fewest = min(count)
        row = min((r for r in range(len(scores)) if count[r] == fewest), key=lambda r: (scores[r][order[r][fewest]], r))
        count[row] += 1
    return [[order[r].index(j) >= count[r] for j in range(len(row))] for r, row in enumerate(scores)]


def slow_matrix(scores: list[list[float]], zeros: int) -> list[list[bool]]:
    cells = [(i, j) for i in range(len(scores)) for j in range(len(scores[0]))]
    cut = set(sorted(cells, key=lambda c: (scores[c[0]][c[1]], c))[:zeros])
    return [[(i, j) not in cut for j in range(len(scores[0]))] for i in range(len(scores))]


@st.composite
def matrices(draw: st.DrawFn, tied: bool) -> tuple[Tensor, int]:
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 40))
    values = st.sampled_from([0.0, 0.5, 1.0, 1.5]) if tied else st.floats(0, 1e6, width=32)
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat).reshape(rows, columns), draw(st.integers(0, rows * columns))


@pytest.mark.parametrize("pattern", [ROW, MATRIX, Unstructured()])
@settings(max_examples=150, deadline=None)
@given(st.one_of(matrices(tied=True), matrices(tied=False)))
def test_unstructured_is_exact(pattern: Unstructured, case: tuple[Tensor, int]) -> None:
    scores, zeros = case
    mask = lowest_mask(scores, zeros, pattern)
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == zeros
    slow = slow_matrix if pattern.compare == "matrix" else slow_row
    assert mask.tolist() == slow(scores.tolist(), zeros)


@pytest.mark.parametrize(("kept", "group"), [(1, 2), (2, 4), (4, 8), (3, 5), (1, 16), (10, 17), (16, 32)])
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 4), tied=st.booleans(), seed=st.integers(0, 999))
def test_nm_in_every_group(kept: int, group: int, rows: int, groups: int, tied: bool, seed: int) -> None:
    scores = torch.rand(rows, groups * group, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 3).round() if tied else scores
    mask = lowest_mask(scores, rows * groups * (group - kept), NofM(kept, group))
    for row_scores, row_mask in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, groups * group, group):
            order = sorted(range(start, start + group), key=lambda j, row=row_scores: (row[j], j))
            assert [j for j in order if not row_mask[j]] == order[: group - kept]


def test_hand_made_masks() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert lowest_mask(scores, 2, ROW).tolist() == [[True, False, True, True], [True, True, True, False]]
    assert lowest_mask(scores, 3, ROW).tolist() == [[True, False, True, False], [True, True, True, False]]
    assert lowest_mask(scores, 3, MATRIX).tolist() == [[True, False, False, False], [True, True, True, True]]
    assert lowest_mask(scores, 4, NofM(1, 2)).tolist() == [[True, False, True, False], [True, False, True, False]]
    assert lowest_mask(torch.ones(2, 4), 5, ROW).tolist() == [[False, False, False, True], [False, False, True, True]]


@pytest.mark.parametrize("pattern", [ROW, MATRIX, NofM(2, 4)])
def test_none_and_all(pattern: Unstructured | NofM) -> None:
    scores = torch.rand(3, 8)
    assert lowest_mask(scores, 0, pattern).all()
    assert not lowest_mask(scores, 24, pattern).any()


@pytest.mark.parametrize("pattern", [ROW, MATRIX])
def test_infinite_scores_go_last(pattern: Unstructured) -> None:
    scores = torch.tensor([[float("inf"), 1.0, float("inf"), 2.0]])
    assert lowest_mask(scores, 3, pattern).tolist() == [[False, False, True, False]]


def test_nan_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match="2 x 2 are NaN"):
        lowest_mask(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1, ROW)


def test_quotas_add_up_and_counts_are_kept() -> None:
    scores = torch.rand(6, 10)
    quotas = row_quotas(scores, 27)
    assert int(quotas.sum()) == 27
    assert set(quotas.tolist()) == {4, 5}
    assert lowest_by_counts(scores, quotas).sum(dim=1).tolist() == quotas.tolist()


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 30), kinds=st.integers(1, 40), data=st.data())
def test_the_kth_lowest_is_that_of_a_sort(rows: int, columns: int, kinds: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, columns))
    scores = torch.randint(kinds, (columns, rows)).T.float().log()  # one of them -inf, many equal
    assert torch.equal(_kth_lowest(scores, k), scores.sort(dim=1).values[:, k - 1 : k])


def test_parse() -> None:
    assert parse_pattern("unstructured") == Unstructured(None)
    assert parse_pattern("unstructured", "row") == ROW
    assert parse_pattern("unstructured", compare="matrix") == MATRIX
    assert parse_pattern("2:4") == parse_pattern("2:4", "row") == NofM(2, 4)
    assert [str(parse_pattern(text)) for text in ("unstructured", "4:8")] == ["unstructured", "4:8"]
    assert sparsity_of_pattern(NofM(1, 4)) == Fraction(3, 4)
    assert sparsity_of_pattern(ROW) is None


@pytest.mark.parametrize(
    "text", ["3:2", "0:4", "4:4", "0:0", "abc", "", "2:", ":4", "2:4:8", "-1:4", "2.0:4", " 2:4", "2:4\n"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InvalidOption, match="pattern") as caught:
        parse_pattern(text)
    assert "\n" not in str(caught.value)


def test_parse_refuses_an_unknown_comparison() -> None:
    with pytest.raises(InvalidOption, match="'row' or 'matrix', not 'column'"):
        parse_pattern("unstructured", "column")


@pytest.mark.parametrize(
    ("shape", "zeros", "pattern", "message"),
    [
        ((3, 10), 15, NofM(2, 4), "2:4 does not divide the 10 columns of a weight of shape 3 x 10"),
        ((3, 8), 13, NofM(2, 4), "2:4 makes 12 zeros in a weight of shape 3 x 8, not 13"),
        ((3, 8), 25, ROW, "3 x 8 cannot have 25 zeros"),
        ((3, 8), -1, MATRIX, "cannot have -1 zeros"),
    ],
)
def test_misfits_are_refused(shape: tuple[int, int], zeros: int, pattern: Unstructured | NofM, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        lowest_mask(torch.rand(shape), zeros, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 brings ties in every row
@pytest.mark.parametrize("pattern", [ROW, MATRIX, NofM(2, 4)])
def test_large_matrices_are_quick(dtype: torch.dtype, pattern: Unstructured | NofM) -> None:
    scores = torch.rand(2048, 2048).to(dtype).float()
    zeros = scores.numel() // 2 + (0 if isinstance(pattern, NofM) else 1001)
    start = time.process_time()  # of this process: the machine may do other work
    mask = lowest_mask(scores, zeros, pattern)
    assert time.process_time() - start < 3
    assert int((~mask).sum()) == zeros


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), kinds=st.integers(1, 50), data=st.data())
def test_rows_lose_alike_with_equal_scores_too(rows: int, columns: int, kinds: int, data: st.DataObject) -> None:
    """One zero more where the next-lowest score is lowest; the mask by a stable sort of every row."""
    zeros = data.draw(st.integers(0, rows * columns))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, kinds), min_size=rows * columns, max_size=rows * columns)))
    scores = scores.float().view(rows, columns)
    ordered, places = scores.sort(dim=1, stable=True)
    base, extra = divmod(zeros, rows)
    next_lowest = [float(ordered[row, base]) if base < columns else 0.0 for row in range(rows)]
    more = sorted(range(rows), key=lambda row: (next_lowest[row], row))[:extra]
    expected = torch.ones(rows, columns, dtype=torch.bool)
    for row in range(rows):
        expected[row, places[row, : base + (row in more)]] = False
    assert torch.equal(lowest_mask(scores, zeros, Unstructured("row")), expected)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), groups=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_on_the_way_to_n_of_m_the_lowest_of_those_that_go_in_the_end(
    rows: int, groups: int, share: float, seed: int
) -> None:
    scores = torch.rand(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    goal = scores.numel() // 2
    zeros = round(share * goal)
    final, now = lowest_mask(scores, goal, NofM(2, 4)), gradual_mask(scores, zeros, goal, NofM(2, 4))
    assert int((~now).sum()) == zeros
    assert not (~now & final).any()
    gone, later = scores[~now], scores[now & ~final]
    assert not len(gone) or not len(later) or gone.max() <= later.min()
    assert torch.equal(gradual_mask(scores, 1, 5, Unstructured("row")), lowest_mask(scores, 1, Unstructured("row")))
