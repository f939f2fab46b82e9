"""The search through command line and Python: what it writes, what it refuses, and how an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
from console import Command
from searching import JOB, bits, subject

import ecoflap
from ecoflap.errors import EcoflapError


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_sensitivity_from_end_to_end(prune: Command, tmp_path: Path) -> None:
    prune(*JOB, "--sparsity", 0.6, "-o", "run").well()
    importance, allocation = (read(tmp_path / "run" / f"{name}.json") for name in ("importance", "allocation"))
    assert importance["settings"]["rule"] == "curves"
    assert importance["settings"]["measured"] == "kl"
    assert set(importance["curves"]) == {f"model.layers.{i}" for i in range(3)}
    for block, curve in importance["curves"].items():
        assert curve["levels"] == [0.3, 0.5, 0.7]
        rows = [row for row in importance["layers"] if row["block"] == block]
        assert sum(row["score"] for row in rows) == pytest.approx(sum(curve["losses"]) / 3)
    assert allocation["rule"] == "curves"
    assert allocation["max_sparsity"] == 1.0
    shares = {row["zeros"] / (row["shape"][0] * row["shape"][1]) for row in allocation["layers"]}
    assert len(shares) > 3  # each matrix its own
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-4)
    assert {"importance", "allocation search", "pruning"} <= {stage["name"] for stage in metrics["stages"]}
    assert not (tmp_path / "run" / "journal").exists()
    # The same with the scores read from their file, where the search is asked for.
    again = ("--importance", "run/importance.json", "--search", *JOB[2:])
    prune(*again, "--sparsity", 0.6, "-o", "again").well()
    assert (tmp_path / "again" / "allocation.json").read_bytes() == (tmp_path / "run" / "allocation.json").read_bytes()


@pytest.mark.parametrize("importance", ["uniform", "owl"])
def test_the_search_begins_with_any_importance(prune: Command, tmp_path: Path, importance: str) -> None:
    job = ("--importance", importance, "--max-sparsity", 0.7)
    prune(*job, "-o", "plain").well()
    prune(*job, "--search", "--search-options", "granularity=block", "-o", "found").well()
    files = [read(tmp_path / name / "allocation.json") for name in ("plain", "found")]
    plain, found = (content["layers"] for content in files)
    record = files[1]["search"]
    assert record["given"] == {row["name"]: row["zeros"] for row in plain}
    assert len(record["losses"]) == len(record["rounds"]) > 1
    assert record["losses"] == sorted(record["losses"], reverse=True)
    assert (record["rounds"][:2], record["metric"]) == (["start", "block 1"], "kl")
    assert set(record["costs"]) == {row["block"] for row in plain}
    assert "search" not in files[0]
    page = (tmp_path / "found" / "report.html").read_text("utf-8")
    assert 'id="search"' in page
    assert 'id="search"' not in (tmp_path / "plain" / "report.html").read_text("utf-8")
    assert sum(row["zeros"] for row in plain) == sum(row["zeros"] for row in found)
    assert [row["zeros"] for row in plain] != [row["zeros"] for row in found]
    assert all(row["zeros"] <= 0.7 * row["shape"][0] * row["shape"][1] + 1 for row in found)


def test_sensitivity_without_the_search(prune: Command, tmp_path: Path) -> None:
    prune("--importance", "sensitivity", "--no-search", "-o", "run").well()
    allocation = read(tmp_path / "run" / "allocation.json")
    assert allocation["granularity"] == "block"
    assert "allocation search" not in {stage["name"] for stage in read(tmp_path / "run" / "metrics.json")["stages"]}


def test_magnitude_is_measured_by_magnitude(prune: Command, tmp_path: Path) -> None:
    prune("--importance", "sensitivity", "--criterion", "magnitude", "--search-options", "rounds=1", "-o", "m").well()
    assert read(tmp_path / "m" / "importance.json")["settings"]["order"] == "magnitude"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--search", "--importance", "uniform", "--pattern", "2:4"), ("search", "2:4")),
        (("--search", "--criterion", "global-magnitude"), ("search", "global-magnitude")),
        (("--search", "--allocation", "run/allocation.json"), ("search", "allocation.json")),
        (("--search", "--search-options", "by=luck"), ("luck", "probes")),
        (("--search", "--search-options", "steps=3"), ("steps",)),
        (("--search", "--search-options", "rounds=many"), ("rounds", "whole number")),
        (("--importance", "sensitivity", "--granularity", "layer"), ("granularity",)),
        (("--importance", "sensitivity", "--importance-options", "levels=0.5,0.3"), ("levels",)),
        (("--importance", "sensitivity", "--importance-options", "levels=half"), ("levels",)),
        (("--importance", "sensitivity", "--importance-options", "order=sparsegpt"), ("order", "wanda")),
        (("--importance", "sensitivity", "--spread", 0.1), ("spread",)),
    ],
)
def test_what_is_refused(prune: Command, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]) -> None:
    if "--allocation" in options:
        prune("--importance", "uniform", "-o", "run").well()
    prune(*options, "-o", "other").refused(*words)
    assert not (tmp_path / "other").exists()


def test_from_python() -> None:
    it = subject("gpt2")
    found = ecoflap.prune(
        picos.gpt2(), it.batches, sparsity=0.5, importance="uniform", search=True, search_options={"rounds": 1},
        criterion="magnitude",
    )  # fmt: skip
    plain = ecoflap.prune(picos.gpt2(), it.batches, sparsity=0.5, importance="uniform", criterion="magnitude")
    assert found.allocation.zeros == plain.allocation.zeros
    assert plain.allocation.search is None
    assert found.allocation.search is not None
    assert found.allocation.search.given == {row.name: row.zeros for row in plain.allocation.layers}
    assert found.allocation.layers != plain.allocation.layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "uniform", "pattern": "2:4", "search": True}, "2:4"),
        ({"search": True, "allocation": "given"}, "allocation"),
        ({"criterion": "global-magnitude", "search": True}, "search"),
        ({"importance": "sensitivity", "search_options": {"by": "luck"}}, "luck"),
        ({"importance": "sensitivity", "granularity": "layer"}, "granularity"),
    ],
)
def test_python_refuses_before_it_measures(options: dict[str, Any], words: str) -> None:
    model, batches = picos.gpt2(), picos.batches("gpt2")
    before = bits(model)
    if "allocation" in options:
        options["allocation"] = ecoflap.prune(picos.gpt2(), batches, importance="uniform", sparsity=0.5).allocation
    with pytest.raises(EcoflapError, match=words):
        ecoflap.prune(model, batches, sparsity=0.5, **options)
    assert bits(model) == before
