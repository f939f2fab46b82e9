"""Defines the sparsity patterns, unstructured and N:M, and checks whether a number of zeros fits a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from ecoflap.errors import InvalidOption

Compare = Literal["row", "matrix"]


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; scores are compared within each output row, or over the whole matrix.

    If ``compare`` is None, the criterion decides (its ``default_compare``), or it is "row".
    """

    compare: Compare | None = None

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """``kept`` weights stay in every run of ``group`` neighbours along the input dimension (2:4 keeps 2 of 4)."""

    kept: int
    group: int

    @property
    def sparsity(self) -> Fraction:
        return 1 - Fraction(self.kept, self.group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


Pattern = Unstructured | NofM


def parse_pattern(text: str, compare: str | None = None) -> Pattern:
    """Read "unstructured" or "N:M" with 0 < N < M; ``compare`` ("row", "matrix") is only for unstructured.

    Raises:
        InvalidOption: anything else.
    """
    if compare not in (None, "row", "matrix"):
        raise InvalidOption(f"compare must be 'row' or 'matrix', not {compare!r}")
    if text == "unstructured":
        return Unstructured("row" if compare == "row" else "matrix" if compare == "matrix" else None)
    parts = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text)
    if parts is None:
        raise InvalidOption(f"pattern must be 'unstructured' or N:M such as 2:4, not {text!r}")
    kept, group = int(parts[1]), int(parts[2])
    if not 0 < kept < group:
        raise InvalidOption(f"pattern {text} is impossible: N:M keeps N of every M weights, with 0 < N < M (as in 2:4)")
    return NofM(kept, group)


def with_default(pattern: Pattern, compare: Compare) -> Pattern:
    """``pattern`` with ``compare`` filled in if it is open."""
    if isinstance(pattern, Unstructured) and pattern.compare is None:
        return replace(pattern, compare=compare)
    return pattern


def sparsity_of_pattern(pattern: Pattern) -> Fraction | None:
    """The sparsity that the pattern fixes; None if it fixes none."""
    return pattern.sparsity if isinstance(pattern, NofM) else None


def check_fits(pattern: Pattern, shape: tuple[int, int], zeros: int) -> None:
    """Raise InvalidOption unless a weight of ``shape`` (out, in) can have ``zeros`` zeros under ``pattern``.

    0 (a layer left dense) and all weights are possible under every pattern.
    """
    rows, columns = shape
    size = rows * columns
    if not 0 <= zeros <= size:
        raise InvalidOption(f"a weight of shape {rows} x {columns} cannot have {zeros} zeros; give 0 to {size}")
    if isinstance(pattern, NofM) and 0 < zeros < size:
        if columns % pattern.group:
            raise InvalidOption(
                f"pattern {pattern} does not divide the {columns} columns of a weight of shape {rows} x {columns}; "
                "exclude the layer or choose another M"
            )
        if zeros != pattern.sparsity * size:
            raise InvalidOption(
                f"pattern {pattern} makes {pattern.sparsity * size} zeros in a weight of shape {rows} x {columns}, "
                f"not {zeros}"
            )
