"""The embedded model: commands without MODEL, with its bundled calibration samples and test questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console import Command


def test_inspect(run: Command) -> None:
    data = json.loads(run("inspect", "--json").well().out)
    assert data["traced"] is True
    assert {tower["modality"] for tower in data["towers"]} == {"vision", "language"}


def test_prune(run: Command, tmp_path: Path) -> None:
    job = ("--samples", 16, "--importance", "first-order", "--importance-samples", 8, "--test-samples", 60)
    run("prune", *job, "-o", "run", "--quiet").well()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert "criterion: admm\n" in (tmp_path / "run" / "recipe.yaml").read_text("utf-8")
    assert metrics["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["dense"]["vqa"]["n"] == 60
    assert metrics["dense"]["vqa"]["value"] > 0.8
    assert all((tmp_path / "run" / "model" / name).exists() for name in ("processor_config.json", "tokenizer.json"))
    again = run("evaluate", "run/model", "--task", "vqa", "--test-samples", 60, "--json").well()
    assert json.loads(again.out)["vqa"]["value"] == metrics["pruned"]["vqa"]["value"]
