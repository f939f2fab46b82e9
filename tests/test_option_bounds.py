"""Numbers of options that could only be a slip of the pen are refused before any work, in every class of options."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ecoflap.errors import InvalidOption
from ecoflap.importance.forward_mode import ForwardMode
from ecoflap.importance.outliers import Owl
from ecoflap.importance.zeroth_order import ZerothOrder
from ecoflap.pruning.admm import ADMM
from ecoflap.pruning.recovery import RecoveryOptions
from ecoflap.pruning.sparsegpt import SparseGPT
from ecoflap.pruning.whole_model import IterativeGradient
from ecoflap.search.options import SearchOptions

COUNTS = [
    (ADMM, "iterations"), (ADMM, "polish"), (SparseGPT, "slab"), (IterativeGradient, "rounds"),
    (RecoveryOptions, "steps"), (ZerothOrder, "draws"), (ForwardMode, "draws"),
    (SearchOptions, "rounds"), (SearchOptions, "samples"), (SearchOptions, "swaps"),
]  # fmt: skip
FACTORS = [
    (ADMM, "damping"), (SparseGPT, "damping"), (RecoveryOptions, "damping"), (ZerothOrder, "epsilon"),
    (Owl, "multiple"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize("value", [-1, 10**10, 10**30, 10**5000])
def test_counts(kind: type, name: str, value: int) -> None:
    with pytest.raises(InvalidOption, match=name) as caught:
        kind(**{name: value})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(("kind", "name"), FACTORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 10**400])
def test_factors(kind: type, name: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=name):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), COUNTS + FACTORS)
def test_what_is_usual_stays(kind: type, name: str) -> None:
    kind(**{name: max(2, getattr(kind(), name))})
