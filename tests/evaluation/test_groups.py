"""Groups of samples have a number and a standard error wherever their values are shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from ecoflap.cli.tables import quality_table
from ecoflap.evaluation.task import Group, TaskResult
from ecoflap.report.data import Metrics
from ecoflap.report.page import tasks
from ecoflap.report.quality import Quality
from ecoflap.run.quality import quality


def _result(right: int, n: int) -> TaskResult:
    share = right / n
    error = math.sqrt(share * (1 - share) / (n - 1))
    return TaskResult(
        "vqa", "accuracy", 0.5, 0.05, 100, by_group={"colour": share, "rare": 1.0}, unit="%",
        groups={"colour": Group(n, error), "rare": Group(1, None)},
    )  # fmt: skip


def test_records_tables_and_pages_have_them() -> None:
    before, after = (quality(_result(right, 40)) for right in (30, 20))
    assert before["groups"]["colour"]["n"] == 40
    assert before["groups"]["rare"] == {"n": 1, "stderr": None}
    console = Console(width=120, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(quality_table({"vqa": before}))
    (line,) = (line for line in console.export_text().splitlines() if "colour" in line)
    assert line.split() == ["colour", "75.0", "%", "±", "6.9", "40"]

    metrics = Metrics(dense={"vqa": Quality(**before)}, pruned={"vqa": Quality(**after)})
    (task,) = tasks(metrics)
    rows: dict[str, Any] = {row.label: row for row in task.groups}
    assert rows["colour (n = 40)"].dense == "75.0 % ± 6.9"
    assert rows["colour (n = 40)"].pruned == "50.0 % ± 8.0"
    assert rows["rare (n = 1)"].dense == "100.0 %"


def test_older_records_have_none() -> None:
    old = {name: value for name, value in quality(_result(30, 40)).items() if name != "groups"}
    (task,) = tasks(Metrics(dense={"vqa": Quality(**old)}, pruned={"vqa": Quality(**old)}))
    assert [(row.label, row.dense) for row in task.groups] == [("colour", "75.0 %"), ("rare", "100.0 %")]


def test_changes_of_groups_are_paired() -> None:
    before, after = (quality(_result(right, 40)) for right in (30, 20))
    of_group = {"difference": -0.25, "stderr": 0.05, "n": 40, "better": 1, "worse": 11, "p": 0.006}
    pair = {**of_group, "groups": {"colour": of_group}}
    metrics = Metrics.model_validate({
        "dense": {"vqa": before}, "pruned": {"vqa": after}, "baseline": {"vqa": before},
        "paired": {"vqa": {"dense": pair, "baseline": pair}},
    })  # fmt: skip
    (task,) = tasks(metrics)
    rows = {row.label: row for row in task.groups}
    told = "−25.0 points ± 5.0; 1 better, 11 worse, p = 0.0060"
    assert (rows["colour (n = 40)"].change, rows["colour (n = 40)"].uniform) == (told, told)
    assert rows["rare (n = 1)"].uniform == "0.0 points"  # of a group that was not paired
    assert task.against_uniform
