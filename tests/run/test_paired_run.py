"""Dense and pruned model on the same samples: what a run writes and shows of their differences."""

from __future__ import annotations

import json
from pathlib import Path

import picos
import pytest
from console import TEXT, Command, llama_and_prose, questions


def test_windows_and_questions_are_paired(run: Command, tmp_path: Path) -> None:
    llama_and_prose(tmp_path)
    options = ("--criterion", "magnitude", "--importance", "uniform", "-o", "run")
    text = tmp_path / "prose.txt"
    shown = run("prune", tmp_path / "llama", "--calibration", text, *TEXT, *options, "--test", text).well().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    dense, pruned = (metrics[when]["perplexity"] for when in ("dense", "pruned"))
    pair = metrics["paired"]["perplexity"]["dense"]
    assert pair["difference"] == pytest.approx(pruned["value"] - dense["value"])
    assert pair["n"] == pair["better"] + pair["worse"] == dense["settings"]["windows"]
    assert 0 < pair["stderr"] < (dense["stderr"] ** 2 + pruned["stderr"] ** 2) ** 0.5
    told = f"{pair['better']} better, {pair['worse']} worse"
    assert told in " ".join(shown.split())
    assert told in (tmp_path / "run" / "report.html").read_text()


def test_answers_are_paired(run: Command, tmp_path: Path) -> None:
    blip2 = picos.write_checkpoint("blip2_t5", tmp_path / "blip2")
    data = questions(tmp_path / "questions")
    run(
        "prune", blip2, "--calibration", data, "--samples", 4, "--criterion", "magnitude", "--importance", "uniform",
        "--sparsity", 0.8, "--test", data, "-o", "run", "--quiet",
    ).well()  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = json.loads((tmp_path / "run" / "predictions.json").read_text())["tasks"]["vqa"]["rows"]
    pair = metrics["paired"]["vqa"]["dense"]
    assert pair["n"] == len(rows) == 12
    assert pair["better"] == sum(row["pruned_score"] > row["dense_score"] for row in rows)
    assert pair["worse"] == sum(row["pruned_score"] < row["dense_score"] for row in rows)
    assert pair["difference"] == pytest.approx(metrics["pruned"]["vqa"]["value"] - metrics["dense"]["vqa"]["value"])
