"""Numbers of options that could only be a slip of the pen are refused before any work, in every class of options."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.evaluation.generate import generate
from ecoflap.importance.forward_mode import ForwardMode
from ecoflap.importance.outliers import Owl
from ecoflap.importance.zeroth_order import ZerothOrder
from ecoflap.model.packed.format import checked_group_size
from ecoflap.pruning.admm import ADMM
from ecoflap.pruning.recovery import RecoveryOptions
from ecoflap.pruning.sparsegpt import SparseGPT
from ecoflap.pruning.whole_model import IterativeGradient
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.recipe import Recipe
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
@pytest.mark.parametrize("value", [-1, 10**10, 10**30, 10**4000])
def test_counts(kind: type, name: str, value: int) -> None:
    with pytest.raises(InvalidOption, match=name) as caught:
        kind(**{name: value})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(("kind", "name"), FACTORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e308, 10**400])
def test_factors(kind: type, name: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=name):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), COUNTS + FACTORS)
def test_what_is_usual_stays(kind: type, name: str) -> None:
    kind(**{name: max(2, getattr(kind(), name))})


@pytest.mark.parametrize(
    ("recipe", "field"), [(Recipe, "sparsity"), (Recipe, "samples"), (Grid, "sparsities"), (Finetune, "epochs")]
)
@pytest.mark.parametrize("value", ["9" * 5000, "x" * 5000])
def test_a_long_value_is_cut_in_the_message(recipe: type[Recipe], field: str, value: str) -> None:
    with pytest.raises(InvalidOption, match=field) as caught:
        recipe.parse({field: value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("field", ["epochs", "search_epochs"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e9, 1e308])
def test_passes_over_the_data(field: str, value: float) -> None:
    with pytest.raises(InvalidOption, match=field):
        UPop.parse({field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("learning_rate", (0.0, 1e-300)), ("weight_decay", (-1.0, 1e9)), ("temperature", (0.0, 1e-300, 1e308)),
        ("distill", (-1.0, 1e9)), ("distill_hidden", (1e9,)), ("accumulate", (0, 10**9)), ("batch_size", (0, 10**10)),
    ],
)  # fmt: skip
def test_numbers_of_a_training(field: str, values: tuple[float, ...]) -> None:
    for value in (*values, math.nan, math.inf):
        with pytest.raises(InvalidOption, match=field):
            Finetune.parse({field: value})


def test_groups_of_columns() -> None:
    for size in (-64, 63, 2**40, 10**30):
        with pytest.raises(InvalidOption, match="group size"):
            checked_group_size("int8", size)


@pytest.mark.parametrize("options", [{"beams": 10**9}, {"beams": 0}, {"new_tokens": 10**9}, {"min_tokens": 9}])
def test_generation(options: dict[str, int]) -> None:
    model, prompter = nn.Linear(1, 1), SimpleNamespace()
    with pytest.raises(InvalidOption, match=next(iter(options))):
        generate(model, prompter, [], **{"new_tokens": 8, **options})  # type: ignore[arg-type]
