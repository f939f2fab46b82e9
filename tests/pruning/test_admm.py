"""ADMM against its formulas in float64, against all masks of small layers, and against SparseGPT."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap.allocation.patterns import NofM, Pattern, Unstructured
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.pruning.admm import ADMM
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.sparsegpt import SparseGPT
from ecoflap.pruning.wanda import Wanda
from ecoflap.statistics.inputs import InputGram, InputNorm
from ecoflap.statistics.pair import InputPair

ROW, MATRIX = Unstructured("row"), Unstructured("matrix")
DAMPING = 0.01


def inputs(columns: int, tokens: int, seed: int, apart: float = 0.3) -> tuple[Tensor, Tensor]:
    """Correlated inputs of unequal size in a dense and in a pruned model, (tokens, columns) each."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    scale = 0.3 + torch.rand(columns, generator=generator)
    dense = torch.randn(tokens, columns, generator=generator) @ mix * scale
    return dense, dense + apart * torch.randn(tokens, columns, generator=generator) * scale


def case(rows: int, columns: int, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, InputPair]:
    """A weight, its inputs in both models, and their statistics."""
    dense, pruned = inputs(columns, tokens or 3 * columns + 5, seed)
    pair = InputPair(columns)
    pair.update(pruned, None, dense)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return weight, dense, pruned, pair


def gram_of(x: Tensor) -> InputGram:
    gram = InputGram(x.shape[1])
    gram.update(x)
    return gram


def zeros_of(pattern: Pattern, size: int) -> int:
    return int(pattern.sparsity * size) if isinstance(pattern, NofM) else size * 6 // 10


def damped(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets (float64) with rows more that stand for the damping: weights drawn to the dense ones."""
    more = DAMPING**0.5 * torch.diag(x.double().norm(dim=0))
    return torch.cat([x.double(), more]), torch.cat([y.double(), more @ weight.double().T])


def error(pruned: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> float:
    a, b = damped(x, y, weight)
    return float((a @ pruned.double().T - b).square().sum())


def fitted(mask: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The best weight with this mask, row by row."""
    a, b = damped(x, y, weight)
    best = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            best[row, kept] = torch.linalg.lstsq(a[:, kept], b[:, row : row + 1], driver="gelsd").solution[:, 0]
    return best


def slow_mask(scores: Tensor, zeros: int, goal: int, pattern: Pattern) -> Tensor:
    rows, columns = scores.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(pattern, NofM):
        cells = []
        for i in range(rows):
            for start in range(0, columns, pattern.group):
                group = sorted(range(start, start + pattern.group), key=lambda j: float(scores[i, j]))
                cells += [(i, j) for j in group[: pattern.group - pattern.kept]]
        cells.sort(key=lambda cell: float(scores[cell]))
        for cell in cells[:zeros]:
            mask[cell] = False
    elif pattern.compare == "matrix":
        mask.view(-1)[scores.flatten().argsort()[:zeros]] = False
    else:
        ordered = scores.sort(dim=1)
        base, extra = divmod(zeros, rows)
        following = ordered.values[:, base] if base < columns else torch.zeros(rows)
        more = set(following.argsort()[:extra].tolist())
        for i in range(rows):
            mask[i, ordered.indices[i, : base + (i in more)]] = False
    return mask


def slow(
    weight: Tensor, x: Tensor, y: Tensor, zeros: int, pattern: Pattern, iterations: int, rho: float
) -> tuple[Tensor, Tensor]:
    """ADMM as its papers write it, in float64: W, Z, U, ρ; then exact least squares."""
    d = x.double().norm(dim=0)
    h = x.double().T @ x.double() / d[:, None] / d + DAMPING * torch.eye(len(d))
    w = weight.double() * d
    b = y.double().T @ x.double() / d + DAMPING * w
    inverse = torch.linalg.inv(h + rho * torch.eye(len(d)))
    u = torch.zeros_like(w)
    choosing = max(1, round(0.75 * iterations))
    mask = torch.ones_like(w, dtype=torch.bool)
    for t in range(1, iterations + 1):
        if t <= choosing:
            count = round((1 - (1 - t / choosing) ** 3) * zeros)
            mask = slow_mask((w + u).abs(), count, zeros, pattern)
        z = torch.where(mask, w + u, 0)
        u = u + w - z
        w = (b + rho * (z - u)) @ inverse
    return fitted(mask, x, y, weight), mask


@pytest.mark.parametrize("targets", ["dense", "own"])
@pytest.mark.parametrize("pattern", [MATRIX, ROW, NofM(2, 4), NofM(1, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(48, 96), (70, 60), (23, 180)])
@pytest.mark.parametrize(("iterations", "rho"), [(1, 1.0), (7, 0.3), (20, 1.0)])
def test_against_the_formulas(
    targets: str, pattern: Pattern, rows: int, columns: int, iterations: int, rho: float
) -> None:
    weight, dense, pruned, pair = case(rows, columns, seed=rows)  # large enough for SparseGPT not to be tried
    zeros = zeros_of(pattern, weight.numel())
    y = (dense if targets == "dense" else pruned) @ weight.T
    got = ADMM(iterations=iterations, polish=200, penalty=rho, targets=targets)(  # type: ignore[arg-type]
        weight, pair if targets == "dense" else gram_of(pruned), zeros, pattern
    )
    expected, mask = slow(weight, pruned, y, zeros, pattern, iterations, rho)
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight.double(), expected, rtol=5e-3, atol=5e-4)


def all_masks(rows: int, columns: int, zeros: int) -> list[Tensor]:
    found = []
    for cells in combinations(range(rows * columns), zeros):
        mask = torch.ones(rows * columns, dtype=torch.bool)
        mask[list(cells)] = False
        found.append(mask.view(rows, columns))
    return found


def test_against_every_mask_of_small_layers() -> None:
    """Never better than the best of all masks, with the best weights for its own, and nearer to it than SparseGPT."""
    excess: dict[str, list[float]] = {"admm": [], "sparsegpt": []}
    for seed in range(40):
        rows, columns, zeros = [(1, 9, 5), (2, 5, 5), (2, 5, 7)][seed % 3]
        weight, _, x, _ = case(rows, columns, seed=seed)
        y, gram = x @ weight.T, gram_of(x)
        best = min(error(fitted(mask, x, y, weight), x, y, weight) for mask in all_masks(rows, columns, zeros))
        ours = ADMM(targets="own", polish=20)(weight, gram, zeros, MATRIX)
        reached = error(ours.weight, x, y, weight)
        assert reached >= best * (1 - 1e-4)
        assert reached == pytest.approx(error(fitted(ours.mask, x, y, weight), x, y, weight), rel=1e-3)
        excess["admm"].append(reached / best)
        excess["sparsegpt"].append(error(SparseGPT()(weight, gram, zeros, MATRIX).weight, x, y, weight) / best)
    mean = {name: sum(found) / len(found) for name, found in excess.items()}
    assert mean["admm"] < 1.25
    assert mean["admm"] - 1 < 0.5 * (mean["sparsegpt"] - 1)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 30),
    tokens=st.integers(1, 300),
    pattern=st.sampled_from([MATRIX, ROW, NofM(2, 4), NofM(1, 4)]),
    share=st.floats(0.05, 0.95),
    iterations=st.sampled_from([8, 20]),
    seed=st.integers(0, 999),
)
def test_error_no_larger_than_that_of_sparsegpt(
    rows: int, groups: int, tokens: int, pattern: Pattern, share: float, iterations: int, seed: int
) -> None:
    weight, dense, x, pair = case(rows, 4 * groups, tokens, seed)
    zeros = int(pattern.sparsity * weight.numel()) if isinstance(pattern, NofM) else int(share * weight.numel())
    for statistics, y in ((gram_of(x), x @ weight.T), (pair, dense @ weight.T)):
        ours = ADMM(iterations=iterations, targets="own" if statistics is not pair else "dense")(
            weight, statistics, zeros, pattern
        )
        theirs = SparseGPT()(weight, statistics, zeros, pattern)
        limit = error(theirs.weight, x, y, weight)
        assert error(ours.weight, x, y, weight) <= limit * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("pattern", [MATRIX, ROW, NofM(2, 4)])
def test_own_outputs_are_the_case_of_equal_inputs(pattern: Pattern) -> None:
    weight, _, x, _ = case(64, 80)
    same = InputPair(80)
    same.update(x, None, x.clone())
    zeros = zeros_of(pattern, weight.numel())
    own = ADMM(targets="own")(weight, gram_of(x), zeros, pattern)
    dense = ADMM(targets="dense")(weight, same, zeros, pattern)
    assert torch.equal(own.mask, dense.mask)
    torch.testing.assert_close(own.weight, dense.weight, rtol=1e-3, atol=1e-4)
    # Statistics of both models serve for the layer's own outputs, and those of one model for either.
    assert torch.equal(ADMM(targets="own")(weight, same, zeros, pattern).mask, own.mask)
    assert torch.equal(ADMM(targets="dense")(weight, gram_of(x), zeros, pattern).weight, own.weight)


def test_dense_outputs_are_met_better_with_dense_targets() -> None:
    weight, dense, x, pair = case(64, 80, tokens=400)
    zeros, y = weight.numel() * 7 // 10, dense @ weight.T
    errors = {
        targets: error(ADMM(targets=targets)(weight, pair, zeros, MATRIX).weight, x, y, weight)  # type: ignore[arg-type]
        for targets in ("dense", "own")
    }
    assert errors["dense"] < 0.95 * errors["own"]


def test_a_dense_layer_makes_up_for_the_layers_before() -> None:
    weight, dense, x, pair = case(6, 10, tokens=100)
    got, mask = ADMM(polish=30)(weight, pair, 0, MATRIX)
    y = dense @ weight.T
    assert mask.all()
    torch.testing.assert_close(got.double(), fitted(mask, x, y, weight), rtol=1e-3, atol=1e-4)
    unchanged, mask = ADMM()(weight, gram_of(x), 0, MATRIX)
    assert mask.all()
    assert torch.equal(unchanged, weight)
    assert not ADMM()(weight, pair, 60, MATRIX).weight.any()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    pattern=st.sampled_from([MATRIX, ROW]),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_counts_are_exact(
    rows: int, columns: int, pattern: Unstructured, iterations: int, seed: int, data: st.DataObject
) -> None:
    zeros = data.draw(st.integers(0, rows * columns))
    weight, _, _, pair = case(rows, columns, seed=seed)
    pruned, mask = ADMM(iterations=iterations)(weight, pair, zeros, pattern)
    assert int((~mask).sum()) == zeros == int((pruned == 0).sum())
    assert not pruned[~mask].any()
    if pattern == ROW:
        per_row = (~mask).sum(dim=1)
        assert int(per_row.max() - per_row.min()) <= 1


@settings(max_examples=40, deadline=None)
@given(
    kept_of=st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 3), (3, 40)]), rows=st.integers(1, 6), groups=st.integers(1, 5)
)
def test_every_group_has_its_zeros(kept_of: tuple[int, int], rows: int, groups: int) -> None:
    kept, group = kept_of
    weight, _, _, pair = case(rows, groups * group, tokens=50)
    pruned, mask = ADMM()(weight, pair, rows * groups * (group - kept), NofM(kept, group))
    assert ((~mask).reshape(-1, group).sum(dim=1) == group - kept).all()
    assert torch.equal(pruned != 0, mask)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("pattern", [MATRIX, ROW, NofM(2, 4)])
def test_fewer_tokens_than_inputs(tokens: int, pattern: Pattern) -> None:
    """The weights that are left can give what the tokens ask for, so they must; and none may run away."""
    weight, dense, x, pair = case(70, 64, tokens=tokens)
    got = ADMM()(weight, pair, weight.numel() // 2, pattern)
    y = dense @ weight.T
    assert float((x @ got.weight.T - y).square().sum()) < 0.05 * float((x @ (weight * got.mask).T - y).square().sum())
    assert float(got.weight.abs().max()) < 4 * float(weight.abs().max())


@pytest.mark.parametrize("shape", [(6, 16), (80, 64)])
def test_dead_inputs_go_first_and_stay_as_they_are(shape: tuple[int, int]) -> None:
    weight, _, x, _ = case(*shape)
    dead = [0, 5, 11, 15]
    x[:, dead] = 0
    weight[:, dead] += 10.0 * weight[:, dead].sign()  # large, yet of no use
    got, mask = ADMM()(weight, gram_of(x), 4 * len(weight), MATRIX)
    expected = torch.ones(shape, dtype=torch.bool)
    expected[:, dead] = False
    assert torch.equal(mask, expected)
    torch.testing.assert_close(got, weight * expected, rtol=1e-4, atol=1e-4)  # nothing to make up for
    few, mask = ADMM()(weight, gram_of(x), 6, MATRIX)
    assert int((~mask[:, dead]).sum()) == 6
    assert torch.equal(few[:, dead], (weight * mask)[:, dead])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, _, _, pair = case(90, 64)
    weight = weight.to(dtype)
    original = weight.clone()
    pruned, mask = ADMM()(weight, pair, 3000, MATRIX)
    in_fp32 = ADMM()(weight.float(), pair, 3000, MATRIX)
    assert pruned.dtype == dtype
    assert torch.equal(mask, in_fp32.mask)
    assert torch.equal(pruned, in_fp32.weight.to(dtype))
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_small_matrices(dtype: torch.dtype) -> None:
    """For these SparseGPT's mask is tried, too."""
    weight, _, _, pair = case(20, 64)
    pruned, mask = ADMM()(weight.to(dtype), pair, 700, MATRIX)
    assert pruned.dtype == dtype
    assert int((~mask).sum()) == int((pruned == 0).sum()) == 700


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_the_inputs_do_not_matter(scale: float) -> None:
    weight, dense, x, pair = case(80, 64)
    other = InputPair(64)
    other.update(x * scale, None, dense * scale)
    one, two = ADMM()(weight, pair, 3000, MATRIX), ADMM()(weight, other, 3000, MATRIX)
    assert torch.equal(one.mask, two.mask)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-3, atol=1e-4)


def test_a_mask_that_is_given_stays() -> None:
    weight, dense, x, pair = case(80, 64)
    for name, rule, pattern in (("wanda", Wanda(), ROW), ("magnitude", Magnitude(), MATRIX)):
        got = ADMM(mask=name, polish=60)(weight, pair, 3000, Unstructured())
        chosen = rule(weight, pair, 3000, pattern)
        assert torch.equal(got.mask, chosen.mask)
        y = dense @ weight.T
        torch.testing.assert_close(got.weight.double(), fitted(got.mask, x, y, weight), rtol=1e-3, atol=1e-3)
    two_of_four = ADMM(mask="wanda")(weight, pair, weight.numel() // 2, NofM(2, 4))
    assert torch.equal(two_of_four.mask, Wanda()(weight, pair, weight.numel() // 2, NofM(2, 4)).mask)


def test_sharing_changes_nothing() -> None:
    weight, dense, x, shared = case(80, 64)
    other = torch.randn(70, 64)
    ADMM()(weight, shared, 3000, MATRIX)
    own = InputPair(64)
    own.update(x, None, dense)
    second, alone = ADMM()(other, shared, 3000, MATRIX), ADMM()(other, own, 3000, MATRIX)
    assert torch.equal(second.weight, alone.weight)
    assert torch.equal(second.mask, alone.mask)


def test_refusals() -> None:
    weight, _, _, pair = case(3, 10)
    for options, message in (
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"polish": -1}, "polish must be at least 0"),
        ({"targets": "sparse"}, "targets must be 'dense' or 'own', not 'sparse'"),
        ({"order": "random"}, "order must be"),
        ({"mask": "global-magnitude"}, "mask must be a criterion that prunes layer by layer"),
    ):
        with pytest.raises(InvalidOption, match=message):
            ADMM(**options)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="does not divide the 10 columns"):
        ADMM()(weight, pair, 15, NofM(2, 4))
    norm = InputNorm(10)
    norm.update(torch.randn(4, 10))
    with pytest.raises(CalibrationError, match="needs an InputGram"):
        ADMM()(weight, norm, 15, MATRIX)
    with pytest.raises(CalibrationError, match="no calibration token"):
        ADMM()(weight, InputPair(10), 15, MATRIX)
    broken = InputGram(10)
    broken.update(torch.ones(4, 10))
    broken.moments[0, 1] = broken.moments[1, 0] = -1e6
    with pytest.raises(CalibrationError, match="can't be inverted"):
        ADMM()(weight, broken, 15, MATRIX)
    weight[1, 1] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"3, 10\) holds NaN"):
        ADMM()(weight, pair, 15, MATRIX)


def test_leaving_the_range_of_fp16_is_refused() -> None:
    x = torch.randn(200, 2)
    x[:, 0] += 50 * x[:, 1]  # to replace the first weight, the second would have to grow fifty-fold
    weight = torch.tensor([[2e3, 6e4]], dtype=torch.float16)
    mask_of_the_first = Magnitude()(weight, None, 1, MATRIX).mask
    assert mask_of_the_first.tolist() == [[False, True]]
    with pytest.raises(NonFiniteLoss, match=r"left the range of torch\.float16"):
        ADMM(mask="magnitude")(weight, gram_of(x), 1, MATRIX)
