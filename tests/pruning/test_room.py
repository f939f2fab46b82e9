"""The line that says where a machine has too little memory for a criterion."""

from __future__ import annotations

from pathlib import Path

import picos
import pytest
from console import prose

from ecoflap.model.parts import Layer
from ecoflap.pruning.room import least_bytes, too_little
from ecoflap.run.prepare import prepare
from ecoflap.run.recipe import Recipe


def layer(rows: int, columns: int, name: str = "down.weight") -> Layer:
    return Layer(
        name=name,
        module=name.rpartition(".")[0],
        block="block",
        tower="tower",
        modality="language",
        shape=(rows, columns),
    )


def test_bytes_are_those_of_the_documented_formula() -> None:
    """docs/memory.md: statistics count twice while they are gathered; else copies of the layer at hand beside them."""
    narrow, wide = layer(64, 16), layer(16, 64)
    assert least_bytes(wide, "pair") == 8 * 64**2 + 16 * 64**2  # the square matrices decide
    assert least_bytes(narrow, "pair") == 8 * 16**2 + 8 * 16**2 + 29 * 64 * 16  # the weight's copies do
    assert least_bytes(wide, "gram") == 4 * 64**2 + 13 * 64**2
    assert least_bytes(wide, "norm") == 12 * 16 * 64


def test_the_line_names_the_widest_layer_and_smaller_criteria() -> None:
    layers = [layer(16, 16, "q.weight"), layer(4096, 14336)]
    needs = least_bytes(layers[1], "pair")
    line = too_little(layers, "admm", "pair", 10**9, 10**9 + needs - 1)
    assert "criterion admm needs at least" in line
    assert "down.weight" in line
    assert f"{(needs + 10**9) / 1e9:.1f} GB" in line
    assert "sparsegpt" in line
    assert "wanda" in line
    assert "(wanda" in too_little(layers, "sparsegpt", "gram", 10**9, 10**9)
    assert too_little(layers, "admm", "pair", 10**9, 10**9 + needs) == ""


@pytest.mark.parametrize("needs", ["norm", "none"])
def test_a_criterion_that_needs_least_is_never_told_off(needs: str) -> None:
    assert too_little([layer(4096, 14336)], "wanda", needs, 10**12, 1) == ""


def test_a_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picos.write_checkpoint("llama", tmp_path / "llama")
    recipe = Recipe(model=str(tmp_path / "llama"), calibration=str(prose(tmp_path / "prose.txt")), samples=4,
                    batch_size=2, sequence_length=12, importance="uniform")  # fmt: skip
    plan = prepare(recipe.resolved())
    assert not list(plan.shortage())
    monkeypatch.setattr("ecoflap.run.prepare.memory_of", lambda device: 1000)
    (line,) = plan.shortage()
    assert "admm" in line
    assert "there are 0.0 GB" in line
