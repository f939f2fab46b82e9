"""The bound that shapes set to replay, by hand, and the script of BLIP-2's shape on a tiny copy."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from picos import FAMILIES

from ecoflap.model.anatomy import discover

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_bound_by_hand() -> None:
    bound = runpy.run_path(str(BENCHMARKS / "bound.py"))
    family = FAMILIES["llama"]
    model, (batch,) = family.build().eval(), family.batches(2, 2)
    anatomy = discover(model, batch)
    with torch.no_grad():
        flops, outside = bound["block_flops"](model, anatomy.replayable, lambda: model(**batch, use_cache=False))
    tokens = batch["input_ids"].numel()
    linear = 2 * tokens * sum(layer.numel for layer in anatomy.blocks[0].layers)
    assert len(set(flops.values())) == 1
    assert linear < flops[anatomy.blocks[0].name] < 1.5 * linear  # attention beside it
    assert outside == 2 * tokens * model.lm_head.weight.numel()
    one = flops[anatomy.blocks[0].name]
    whole = 3 * one + outside
    costs = [whole] * 7 + [2 * one + outside] * 7 + [one + outside] * 7  # seven matrices in each of three blocks
    assert bound["replay_bound"](flops, outside, anatomy.layers) == pytest.approx(whole * 21 / sum(costs))


def test_blip2_shape_on_a_tiny_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "numbers.json"
    words = ["--shrink", "16", "--blocks", "1", "--layers", "2", "--samples", "1", "--answer", "2"]
    monkeypatch.setattr(sys, "argv", ["blip2_shape.py", *words, "--output", str(output)])
    runpy.run_path(str(BENCHMARKS / "blip2_shape.py"), run_name="__main__")
    found = json.loads(output.read_text("utf-8"))
    assert found["same"] is True
    assert found["real_matrices"] == 4 + 7 + 11
    assert found["bound"] > 1
    assert "identical to the bit: True" in capsys.readouterr().out
