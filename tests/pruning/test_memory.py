"""The expected memory of stage 2 against sizes counted by hand on a model whose shapes are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy, Layer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from memory import Memory, expected_memory, working_bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)  # of one input
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        x = x + self.q(y) + self.k(y).mean()
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def run(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch)


@pytest.fixture(scope="module")
def found() -> tuple[Model, Anatomy, list[dict[str, Tensor]]]:
    model = Model()
    batches = [{"x": torch.randn(rows, 5, 8)} for rows in (2, 2, 1)]
    return model, discover(model, batches[0], run=run), batches


def test_inputs_statistics_and_forward(found: tuple[Model, Anatomy, list[dict[str, Tensor]]]) -> None:
    model, anatomy, batches = found
    tokens = 10  # of the first batch; all three have 25
    inputs, forward = (25 + tokens) * 8 * 4, tokens * (8 + 4 + 24 + 8 + 3 * 8 + 24) * 4
    norms = expected_memory(model, anatomy, batches, run, "norm")
    assert norms == Memory(inputs, (8 + 8 + 24) * 4, 3 * 4 * 8 * 24, forward)
    grams = expected_memory(model, anatomy, batches, run, "gram")
    assert grams.statistics == (8 * 8 + 8 * 8 + 24 * 24) * 4
    assert grams.total == inputs + max(2 * grams.statistics + forward, grams.statistics + grams.working)
    # Dense inputs of y, x and relu, less those done; of the run so far: y; y and x; y, x and relu.
    waiting = 25 * 4 * max(8 + 8 + 24 + 8, 8 + 24 + 16, 24 + 40)
    pair = expected_memory(model, anatomy, batches, run, "pair")
    assert pair.inputs == 2 * inputs + waiting
    elsewhere = expected_memory(model, anatomy, batches, run, "norm", "disk")
    assert elsewhere.inputs == 2 * tokens * 8 * 4
    assert expected_memory(model, anatomy, batches, run, "none") == Memory(0, 0, 3 * 4 * 8 * 24, 0)


@pytest.mark.parametrize(("rows", "columns", "numbers"), [(24, 8, 8 * 8 + 3 * 24 * 8), (8, 240, 13 * 240 * 240 // 4)])
def test_the_working_copies_of_sparsegpt(rows: int, columns: int, numbers: int) -> None:
    layer = Layer("weight", "", "", "", "language", (rows, columns))
    assert working_bytes(layer, "gram") == 4 * numbers


def test_the_model_is_left_as_it_was(found: tuple[Model, Anatomy, list[dict[str, Tensor]]]) -> None:
    model, anatomy, batches = found
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected_memory(model, anatomy, batches, run, "gram")
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
