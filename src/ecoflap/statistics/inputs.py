"""Defines the statistics of a layer's inputs, summed batch by batch in fp32, without padding tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ecoflap.errors import CalibrationError, NonFiniteLoss

Self = TypeVar("Self", bound="_Accumulator")
Gram = TypeVar("Gram", bound="InputGram")

# Tokens are converted to fp32 in parts: small enough for a core's cache, with enough rows for an efficient product.
_NORM_PART = 2**17
GRAM_PART = 512


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Context in which fp32 products of values from ``x``'s dtype may use faster units that multiply them exactly.

    Such units (TF32 on a GPU for bf16 and fp16, a CPU's bf16 units for bf16) multiply half-precision values without
    rounding, sum in fp32, and are several times faster. For an fp32 ``x`` nothing changes.
    """
    kind, gpu = x.dtype, x.is_cuda
    backend: Any = torch.backends.cuda.matmul if gpu else getattr(torch.backends.mkldnn, "matmul", None)
    if kind not in ((torch.bfloat16, torch.float16) if gpu else (torch.bfloat16,)) or not hasattr(
        backend,
        "fp32_precision",  # torch before 2.9
    ):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if gpu else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


class _Accumulator:
    """A sum over tokens, on the device of its first input.

    It may consist of several sums, one for each group of batches (:class:`~ecoflap.support.workers.Share`):
    :meth:`begin` sets the group of the next inputs, and :meth:`close` must be called before anything is read.

    Attributes:
        apart: keep the sums of the groups separate, because sums of another worker are added before them.
    """

    def __init__(self, columns: int, shape: tuple[int, ...]) -> None:
        self.columns = columns
        self.tokens = 0
        self.apart = False
        self._sum = torch.zeros(shape)
        self._closed: list[Tensor] = []
        self._group: int | None = None

    def begin(self, group: int) -> None:
        """Begin a group; groups must come in order."""
        if self._group is not None and group != self._group:
            if self._closed and not self.apart:
                self._closed[0] += self._sum
                self._sum.zero_()
            else:
                self._closed.append(self._sum)
                self._sum = torch.zeros_like(self._sum)
        self._group = group

    def close(self) -> None:
        """End the input: add the sums of all groups, from the first to the last.

        Raises:
            NonFiniteLoss: the groups are finite, but their sum is not.
        """
        if self._closed:
            self.absorb(self.sums())

    def sums(self) -> list[Tensor]:
        """The sums of the separate groups, in order."""
        return [*self._closed, self._sum]

    def absorb(self, sums: Iterable[Tensor], tokens: int = 0) -> None:
        """Replace the sum by that of ``sums``, added from the first to the last, and add ``tokens`` to the count."""
        total: Tensor | None = None
        for one in sums:
            total = one if total is None else total.add_(one)
        if total is not None:
            self._sum, self._closed, self._group = total, [], None
        self.tokens += tokens
        self._check()

    def fill_up(self, others: _Accumulator, tokens: int) -> None:
        """Fill up to at least ``tokens`` tokens with average tokens of ``others``.

        With n own tokens the result is XᵀX + (tokens − n) · X₀ᵀX₀ / n₀ (for norms its diagonal): a shrinkage towards
        the others' second moments with the weight (tokens − n) / tokens.
        """
        missing = tokens - self.tokens
        if missing > 0 and others.tokens:
            self._sum = self._sum.to(others._sum.device) + others._sum * (missing / others.tokens)
            self.tokens = tokens

    def clone(self: Self) -> Self:
        """A copy that goes its own way from here."""
        twin = copy.copy(self)
        twin._sum, twin._closed = self._sum.clone(), [one.clone() for one in self._closed]
        return twin

    def with_others(self: Self, others: Sequence[_Accumulator]) -> Self:
        """The sum of this and ``others``, all closed, from the first to the last; itself if there are no others."""
        if not others:
            return self
        total = self.clone()
        sums = [one.to(total._sum.device) for other in others for one in other.sums()]
        total.absorb([*total.sums(), *sums], sum(other.tokens for other in others))
        return total

    def _tokens_of(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The tokens of ``x`` (..., columns) that count, as (tokens, columns); first moves the sum to x's device.

        If ``keep`` has weights, each token is multiplied by the square root of its weight.
        """
        if x.shape[-1] != self.columns:
            raise ValueError(f"inputs have {x.shape[-1]} columns, the statistic {self.columns}")
        flat = x.detach().reshape(-1, self.columns)
        if keep is not None:
            if keep.numel() != len(flat):
                raise ValueError(f"keep has {keep.numel()} entries for {len(flat)} tokens")
            keep = keep.reshape(-1).to(flat.device)
            flat = flat[keep.bool()]
            if keep.is_floating_point():
                flat = flat.float() * keep[keep > 0].sqrt().unsqueeze(1)
        if self._sum.device != flat.device and self.tokens == 0:
            self._sum = self._sum.to(flat.device)
        return flat.to(self._sum.device)

    def _rows(self, elements: int) -> int:
        """Number of tokens to process at once for ``elements`` fp32 numbers, on the sum's device."""
        return max(1, (elements if self._sum.device.type == "cpu" else 64 * elements) // self.columns)

    def _counted(self, tokens: int) -> None:
        if tokens:
            self._check()
        self.tokens += tokens

    def _check(self) -> None:
        if not torch.isfinite(self._squares()).all():
            raise NonFiniteLoss("a layer's input is NaN, infinite or too large to square in fp32")

    def _squares(self) -> Tensor:
        """(columns,) sums that are not finite if any input is not finite."""
        return self._sum


class InputNorm(_Accumulator):
    """||X_j||_2 of every input column j over all real tokens.

    Args:
        columns: width of the layer's input.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(columns, (columns,))

    def update(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Add inputs ``x`` (..., columns); ``keep`` (leading dims of x, or flat) is True for real tokens, or
        has the weight of each token's square.

        Raises:
            NonFiniteLoss: a real token holds NaN or infinity; the statistic is then spoilt.
            ValueError: shapes don't match.
        """
        tokens = self._tokens_of(x, keep)
        for part in torch.split(tokens, self._rows(_NORM_PART)):
            self._sum += part.to(torch.float32, copy=True).square_().sum(dim=0)
        self._counted(len(tokens))

    @property
    def norm(self) -> Tensor:
        """(columns,) fp32."""
        return self._sum.sqrt()


class InputGram(_Accumulator):
    """H = 2/n XᵀX of a layer's inputs, the Hessian of its squared output error; also has an InputNorm's ``norm``.

    All layers that read the same input (q, k, v) share one object: the factor is computed once.

    Args:
        columns: width of the layer's input.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(columns, (columns, columns))
        self._shared: dict[Hashable, Tensor] = {}

    def update(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Add inputs ``x`` (..., columns); ``keep`` (leading dims of x, or flat) is True for real tokens, or
        has the weight of each token's square.

        Raises:
            NonFiniteLoss: a real token holds NaN or infinity; the statistic is then spoilt.
            ValueError: shapes don't match.
        """
        tokens = self._tokens_of(x, keep)
        with exact_products(tokens):
            for part in torch.split(tokens, self._rows(GRAM_PART * self.columns)):
                part = part.float()
                self._sum.addmm_(part.T, part)
        self._shared.clear()
        self._counted(len(tokens))

    def fill_up(self, others: _Accumulator, tokens: int) -> None:
        """As in the base class."""
        super().fill_up(others, tokens)
        self._shared.clear()

    def clone(self: Gram) -> Gram:
        """A copy that goes its own way from here."""
        twin = super().clone()
        twin._shared = dict(self._shared)
        return twin

    def absorb(self, sums: Iterable[Tensor], tokens: int = 0) -> None:
        """As in the base class."""
        self._shared.clear()
        super().absorb(sums, tokens)

    def _squares(self) -> Tensor:
        return self.moments.diagonal()  # a value that is not finite shows in the diagonal

    @property
    def moments(self) -> Tensor:
        """(columns, columns) fp32: XᵀX. Don't write to it."""
        return self._sum

    @property
    def norm(self) -> Tensor:
        """(columns,) fp32: ||X_j||_2."""
        return self.moments.diagonal().sqrt()

    @property
    def hessian(self) -> Tensor:
        """(columns, columns) fp32, H = 2/n XᵀX."""
        return self.moments * (2 / max(self.tokens, 1))

    @property
    def dead(self) -> Tensor:
        """(columns,) bool: inputs that were zero in every token."""
        return self.moments.diagonal() == 0

    def shared(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The result of ``make``, which depends only on the inputs; computed once for all layers that read them.

        Args:
            key: identifies the result, with the options that it depends on.
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def inverse_factor(self, damping: float = 0.01) -> Tensor:
        """Upper triangular U with UᵀU = (H + damping · mean(diag H) · I)⁻¹, for SparseGPT. Computed once.

        Dead inputs are decoupled: their row and column of U are those of the unit matrix. If H is too ill-conditioned
        for fp32, ten times the damping is tried, up to three times.

        Returns:
            (columns, columns) fp32, on the device of the inputs; don't write to it.

        Raises:
            CalibrationError: H can't be factorised even so.
        """
        return self.shared(("inverse factor", damping), lambda: self._factorise(damping))

    def _factorise(self, damping: float) -> Tensor:
        dead = self.dead
        mean = float(self.moments.diagonal().mean()) * 2 / max(self.tokens, 1)
        for _ in range(4):
            # Cholesky of H with rows and columns reversed gives H = R Rᵀ with R upper; then U = R⁻¹. This needs one
            # factorisation, and avoids H⁻¹, which is as ill-conditioned and would add rounding errors.
            reverse = self.moments.flip(0, 1).mul_(2 / max(self.tokens, 1))
            reverse.diagonal().add_(damping * mean).masked_fill_(dead.flip(0), 1.0)
            lower, failed = torch.linalg.cholesky_ex(reverse)
            del reverse
            if not failed:
                root = lower.flip(0, 1)
                del lower
                upper = _invert_upper(root)
                upper[dead] = 0
                upper.diagonal()[dead] = 1.0
                if all_finite(upper):
                    return upper
            damping = damping * 10 or 0.01
        raise CalibrationError(
            "the inputs' second moments can't be inverted; use more calibration samples or a larger damping"
        )


InputStatistics = InputNorm | InputGram


def _invert_upper(r: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves: a third of the work of a solve with the unit matrix."""
    size = len(r)
    if size <= 512:
        unit = torch.eye(size, dtype=r.dtype, device=r.device)
        return cast(Tensor, torch.linalg.solve_triangular(r, unit, upper=True))
    half = size // 2
    inverse = torch.zeros_like(r)
    inverse[:half, :half] = _invert_upper(r[:half, :half])
    inverse[half:, half:] = _invert_upper(r[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (r[:half, half:] @ inverse[half:, half:])
    return inverse


def all_finite(tensor: Tensor) -> bool:
    """Whether it has no NaN and no infinity; checks minimum and maximum, which needs no mask."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
