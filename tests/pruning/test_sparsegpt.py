"""SparseGPT against a literal optimal brain surgeon in float64 that eliminates one input at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Pattern, Unstructured
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.sparsegpt import SparseGPT
from ecoflap.statistics.inputs import InputGram, InputNorm

ROW, MATRIX = Unstructured("row"), Unstructured("matrix")


def case(rows: int, columns: int, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, InputGram]:
    """A weight, correlated inputs of unequal size, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens or 3 * columns + 5, columns, generator=generator) @ mix
    x = x * (0.3 + torch.rand(columns, generator=generator))
    gram = InputGram(columns)
    gram.update(x)
    return torch.randn(rows, columns, generator=generator), x, gram


def counts_of_slab(
    pattern: Unstructured, scores: Tensor, zeros: int, rows: int, columns: int, a: int, b: int
) -> Tensor:
    """How many of each row's cells go in columns a..b-1: chosen over the slab for "matrix", equal rows for "row"."""
    if pattern.compare == "matrix":
        return torch.tensor(zeros * b // columns - zeros * a // columns)
    base, extra = divmod(zeros, rows)
    per_row = torch.full((rows,), base)
    if extra:
        following = scores.sort(dim=1).values[:, base]
        per_row[following.argsort()[:extra]] += 1
    return torch.tensor([int(q) * b // columns - int(q) * a // columns for q in per_row])


def slow(weight: Tensor, x: Tensor, zeros: int, pattern: Pattern, slab: int, damping: float) -> tuple[Tensor, Tensor]:
    """OBS (Hassibi & Stork 1993) over the columns in turn, with the inverse Hessian of what is left kept explicitly."""
    w = weight.double().clone()
    rows, columns = w.shape
    h = 2 / len(x) * x.double().T @ x.double()
    h += damping * h.diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(h)
    diagonal = torch.empty(columns, dtype=torch.float64)  # [H_F^-1]_jj with the columns before j eliminated
    stages = []
    for j in range(columns):
        diagonal[j] = inverse[j, j]
        stages.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    at_first = w.square() / diagonal
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if isinstance(pattern, NofM):
            if j % pattern.group == 0:
                for i in range(rows):
                    scores = w[i, j : j + pattern.group].square() / diagonal[j : j + pattern.group]
                    for k in scores.argsort()[: pattern.group - pattern.kept].tolist():
                        mask[i, j + k] = False
        elif j % slab == 0:
            stop = min(j + slab, columns)
            scores = w[:, j:stop].square() / diagonal[j:stop]
            counts = counts_of_slab(pattern, at_first, zeros, rows, columns, j, stop)
            if counts.dim() == 0:
                cells = scores.flatten().argsort()[: int(counts)]
                mask[cells // (stop - j), j + cells % (stop - j)] = False
            else:
                for i in range(rows):
                    mask[i, j + scores[i].argsort()[: int(counts[i])]] = False
        for i in range(rows):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / diagonal[j] * stages[j][j:]
                w[i, j] = 0.0
    return w, mask


def loss(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    return float(((pruned.double() - weight.double()) @ x.double().T).square().sum())


@pytest.mark.parametrize("pattern", [MATRIX, ROW, Unstructured(), NofM(2, 4), NofM(4, 8), NofM(1, 3)])
@pytest.mark.parametrize(
    ("rows", "columns", "slab"), [(7, 24, 8), (5, 48, 128), (16, 72, 24), (1, 24, 8), (6, 120, 50)]
)
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_against_the_literal_version(pattern: Pattern, rows: int, columns: int, slab: int, damping: float) -> None:
    weight, x, gram = case(rows, columns, seed=rows)
    size = rows * columns
    zeros = int(pattern.sparsity * size) if isinstance(pattern, NofM) else size * 55 // 100
    pruned, mask = SparseGPT(damping=damping, slab=slab)(weight, gram, zeros, pattern)
    expected = MATRIX if pattern == Unstructured() else pattern
    slow_weight, slow_mask = slow(weight, x, zeros, expected, slab, damping)
    assert torch.equal(mask, slow_mask)
    torch.testing.assert_close(pruned.double(), slow_weight, rtol=2e-3, atol=2e-4)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    slab=st.sampled_from([1, 3, 8, 128]),
    pattern=st.sampled_from([MATRIX, ROW]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_counts_are_exact(
    rows: int, columns: int, slab: int, pattern: Unstructured, seed: int, data: st.DataObject
) -> None:
    zeros = data.draw(st.integers(0, rows * columns))
    weight, _, gram = case(rows, columns, seed=seed)
    pruned, mask = SparseGPT(slab=slab)(weight, gram, zeros, pattern)
    assert int((~mask).sum()) == zeros == int((pruned == 0).sum())
    assert not pruned[~mask].any()
    if pattern == ROW:
        per_row = (~mask).sum(dim=1)
        assert int(per_row.max() - per_row.min()) <= 1


@settings(max_examples=40, deadline=None)
@given(
    kept_of=st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 3), (3, 40), (100, 200)]),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
)
def test_every_group_has_its_zeros(kept_of: tuple[int, int], rows: int, groups: int) -> None:
    kept, group = kept_of
    weight, _, gram = case(rows, groups * group, tokens=50)
    pruned, mask = SparseGPT()(weight, gram, rows * groups * (group - kept), NofM(kept, group))
    assert ((~mask).reshape(-1, group).sum(dim=1) == group - kept).all()
    assert torch.equal(pruned != 0, mask)


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NofM(2, 4)])
def test_none_and_all(pattern: Pattern) -> None:
    weight, _, gram = case(5, 12)
    dense, mask = SparseGPT()(weight, gram, 0, pattern)
    assert torch.equal(dense, weight)
    assert mask.all()
    empty, mask = SparseGPT()(weight, gram, 60, pattern)
    assert not empty.any()
    assert not mask.any()


def test_one_weight_matches_the_closed_form() -> None:
    weight, x, gram = case(1, 10)
    pruned, mask = SparseGPT(slab=1)(weight, gram, 1, MATRIX)
    last = int((~mask).nonzero()[0, 1])
    assert last == 9  # the only zero falls in the last slab: with nothing after it, nothing makes up for it
    assert torch.equal(pruned[:, :9], weight[:, :9])
    # With one slab, the weight that goes is the one that the weights after it replace best.
    pruned, mask = SparseGPT(damping=1e-6)(weight, gram, 1, MATRIX)
    cut = int((~mask).nonzero()[0, 1])
    h = 2 / len(x) * x.double().T @ x.double()
    losses = []
    for j in range(10):
        rest = h[j + 1 :, j + 1 :]
        shift = torch.linalg.solve(rest, h[j + 1 :, j]) * weight[0, j].double()
        losses.append(weight[0, j].double() ** 2 * (h[j, j] - h[j, j + 1 :] @ torch.linalg.solve(rest, h[j + 1 :, j])))
        if j == cut:
            torch.testing.assert_close(
                pruned[0, j + 1 :].double(), weight[0, j + 1 :].double() + shift, rtol=1e-3, atol=1e-4
            )
            assert torch.equal(pruned[0, :j], weight[0, :j])
    assert cut == int(torch.stack(losses).argmin())


@pytest.mark.parametrize("seed", range(5))
def test_one_zero_costs_no_more_than_without_an_update(seed: int) -> None:
    weight, x, gram = case(1, 30, seed=seed)
    by_magnitude = Magnitude()(weight, None, 1, MATRIX)
    pruned = SparseGPT()(weight, gram, 1, MATRIX)
    assert loss(weight, pruned.weight, x) <= loss(weight, by_magnitude.weight, x) * (1 + 1e-6)
    # Also when both cut the same weight: the update alone pays.
    assert loss(weight, pruned.weight, x) <= loss(weight, weight * pruned.mask, x) * (1 + 1e-6)


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NofM(2, 4)])
def test_reconstructs_better_than_magnitude(pattern: Pattern) -> None:
    weight, x, gram = case(64, 128)
    zeros = weight.numel() // 2
    ours = loss(weight, SparseGPT(slab=32)(weight, gram, zeros, pattern).weight, x)
    assert ours < 0.8 * loss(weight, Magnitude()(weight, None, zeros, pattern).weight, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, _, gram = case(9, 33)
    weight = weight.to(dtype)
    original = weight.clone()
    pruned, mask = SparseGPT()(weight, gram, 150, MATRIX)
    in_fp32 = SparseGPT()(weight.float(), gram, 150, MATRIX)
    assert pruned.dtype == dtype
    assert torch.equal(mask, in_fp32.mask)
    assert torch.equal(pruned, in_fp32.weight.to(dtype))
    assert torch.equal(weight, original)


def test_strips_and_slabs_are_only_an_order_of_computing() -> None:
    """With N:M the mask depends on current weights alone, so the slab's size may not matter."""
    weight, _, gram = case(8, 96)
    one = SparseGPT(slab=4)(weight, gram, 384, NofM(2, 4))
    other = SparseGPT(slab=96)(weight, gram, 384, NofM(2, 4))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [MATRIX, ROW])
def test_dead_inputs_go_first_and_stay_as_they_are(pattern: Unstructured) -> None:
    weight, x, _ = case(6, 16)
    dead = [0, 5, 11, 15]
    x[:, dead] = 0
    weight[:, dead] += 10.0 * weight[:, dead].sign()  # large, yet of no use
    gram = InputGram(16)
    gram.update(x)
    pruned, mask = SparseGPT()(weight, gram, 24, pattern)
    expected = torch.ones(6, 16, dtype=torch.bool)
    expected[:, dead] = False
    assert torch.equal(mask, expected)
    assert torch.equal(pruned, weight * expected)  # nothing to make up for
    few, mask = SparseGPT()(weight, gram, 6, pattern)
    assert not mask[:, dead].all()
    assert torch.equal(few, weight * mask)


def test_sharing_changes_nothing() -> None:
    weight, x, shared = case(8, 20)
    other = torch.randn(4, 20)
    SparseGPT()(weight, shared, 80, MATRIX)
    own = InputGram(20)
    own.update(x)
    second, alone = SparseGPT()(other, shared, 40, MATRIX), SparseGPT()(other, own, 40, MATRIX)
    assert torch.equal(second.weight, alone.weight)
    assert torch.equal(second.mask, alone.mask)


def test_padding_and_batching_do_not_change_masks() -> None:
    weight, x, gram = case(8, 20)
    padded = InputGram(20)
    for batch in torch.cat([x, torch.full((7, 20), 1e3)]).split(9):
        padded.update(batch, (batch != 1e3).any(dim=1))
    one, other = SparseGPT()(weight, padded, 80, MATRIX), SparseGPT()(weight, gram, 80, MATRIX)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    weight, _, gram = case(3, 10)
    with pytest.raises(InvalidOption, match="does not divide the 10 columns of a weight of shape 3 x 10"):
        SparseGPT()(weight, gram, 15, NofM(2, 4))
    with pytest.raises(InvalidOption, match="cannot have 31 zeros"):
        SparseGPT()(weight, gram, 31, MATRIX)
    with pytest.raises(InvalidOption, match="damping must be above 0"):
        SparseGPT(damping=0.0)
    with pytest.raises(InvalidOption, match="slab must be at least 1"):
        SparseGPT(slab=0)
    norm = InputNorm(10)
    norm.update(torch.randn(4, 10))
    with pytest.raises(CalibrationError, match="needs an InputGram"):
        SparseGPT()(weight, norm, 15, MATRIX)
    with pytest.raises(CalibrationError, match="no calibration token"):
        SparseGPT()(weight, InputGram(10), 15, MATRIX)
    weight[1, 1] = float("nan")
    with pytest.raises(NonFiniteLoss, match="3 x 10 holds NaN"):
        SparseGPT()(weight, gram, 15, MATRIX)


def test_leaving_the_range_of_fp16_is_refused() -> None:
    x = torch.randn(200, 2)
    x[:, 0] += 50 * x[:, 1]  # to replace the first weight, the second would have to grow fifty-fold
    gram = InputGram(2)
    gram.update(x)
    weight = torch.tensor([[2e3, 6e4]], dtype=torch.float16)
    with pytest.raises(NonFiniteLoss, match=r"left the range of torch\.float16"):
        SparseGPT()(weight, gram, 1, MATRIX)
    assert SparseGPT()(weight.bfloat16(), gram, 1, MATRIX).weight[0, 1] > 65504
