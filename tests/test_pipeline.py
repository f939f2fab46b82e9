"""The whole job from Python: every family from data on disk, progress, what a run says of itself when it ends early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from console import model_weights, prose, questions

from ecoflap.errors import CalibrationError, InvalidOption, OutputExists
from ecoflap.evaluation import TaskResult
from ecoflap.run.directory import RunFailed, Stopped
from ecoflap.run.evaluations import tasks_of
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.quality import quality
from ecoflap.run.recipe import Recipe

pytestmark = pytest.mark.usefixtures("pageless")


class Recorder:
    """Progress that remembers its stages: name, total, done at the beginning, steps."""

    def __init__(self) -> None:
        self.stages: list[list[Any]] = []

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Recorder]:
        self.stages.append([name, total, done, 0])
        yield self

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.stages[-1][3] += steps


def _data(name: str, folder: Path) -> Path:
    """Calibration data of the kind that the family is trained on."""
    if name in ("llama", "gpt2", "t5"):
        return prose(folder / "prose.txt")
    path = questions(folder / "data")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if name == "vit":
        rows = [{"image": row["image"], "label": str(number % 5)} for number, row in enumerate(rows)]
    elif name == "clip":
        rows = [{"image": row["image"], "caption": f"a {row['answer']} picture"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("name", ["blip2_t5", "blip2_opt", "llava", "clip", "vit", "t5", "llama", "gpt2"])
def test_every_family_from_disk_to_disk(name: str, tmp_path: Path) -> None:
    model = picos.write_checkpoint(name, tmp_path / name)
    recipe = Recipe(
        model=str(model), calibration=str(_data(name, tmp_path)), samples=6, importance_samples=4, batch_size=2,
        sequence_length=20, sparsity=0.5, task=("vqa",) if name in ("blip2_t5", "blip2_opt", "llava") else None,
        test=str(tmp_path / "data" / "questions.jsonl") if name in ("blip2_t5", "blip2_opt", "llava") else None,
    )  # fmt: skip
    run = run_recipe(recipe, tmp_path / "run")
    allocation = json.loads((run / "allocation.json").read_text("utf-8"))
    weights = model_weights(run / "model")
    assert set(weights) == set(model_weights(model))
    built = picos.FAMILIES[name].build()
    loaded = type(built).from_pretrained(run / "model")
    for row in allocation["layers"]:
        assert int((loaded.get_parameter(row["name"]) == 0).sum()) == row["zeros"]
    assert sum(row["zeros"] for row in allocation["layers"]) == round(0.5 * allocation["total_weights"])
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["unreached"] == []
    assert set(metrics["dense"]) == set(metrics["pruned"]) == set(recipe.task or ())


def _llama(folder: Path, **more: Any) -> Recipe:
    if not (folder / "llama").exists():
        picos.write_checkpoint("llama", folder / "llama")
        prose(folder / "prose.txt")
    values = {"samples": 6, "importance_samples": 4, "batch_size": 2, "sequence_length": 12, **more}
    return Recipe(model=str(folder / "llama"), calibration=str(folder / "prose.txt"), **values)


def test_progress(tmp_path: Path) -> None:
    recorder = Recorder()
    recipe = _llama(tmp_path, test=str(tmp_path / "prose.txt"), test_samples=3)
    run_recipe(recipe, tmp_path / "run", progress=recorder)
    assert recorder.stages == [
        ["loading", 3, 0, 3],
        ["perplexity, dense", 3, 0, 3],
        ["importance", 42, 0, 42],
        ["pruning", 5, 0, 5],  # each of three blocks for its statistics, and two for the inputs of the next
        ["saving", 1, 0, 1],
        ["perplexity, pruned", 3, 0, 3],
    ]


def test_the_batch_size_does_not_choose_the_samples(tmp_path: Path) -> None:
    """Pruning statistics are sums over tokens: another batch size gives the same masks from the same samples."""
    zeros = []
    for size in (1, 3):
        recipe = _llama(tmp_path, batch_size=size, importance="uniform", criterion="wanda")
        weights = model_weights(run_recipe(recipe, tmp_path / f"run{size}") / "model")
        zeros.append({name: weight == 0 for name, weight in weights.items()})
    assert all(torch.equal(zeros[0][name], zeros[1][name]) for name in zeros[0])


def test_two_seeds_differ_and_one_does_not(tmp_path: Path) -> None:
    scores = []
    for number, seed in enumerate((0, 0, 1)):
        run = run_recipe(_llama(tmp_path, seed=seed), tmp_path / f"run{number}")
        scores.append((run / "importance.json").read_bytes())
    assert scores[0] == scores[1] != scores[2]


def test_errors_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _llama(tmp_path)
    with pytest.raises(CalibrationError):
        run_recipe(recipe.model_copy(update={"calibration": None}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("inside")

    with monkeypatch.context() as patch:
        patch.setattr("ecoflap.run.pipeline.pruned_to", broken)
        with pytest.raises(RunFailed, match=r"ZeroDivisionError: inside \(the traceback is in .*log\.txt") as failed:
            run_recipe(recipe, tmp_path / "run")
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert failed.value.exit_code == 1
    with pytest.raises(OutputExists):
        run_recipe(recipe, tmp_path / "run")

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ecoflap.run.pipeline.pruned_to", stopped)
        with pytest.raises(Stopped) as stop:
            run_recipe(recipe, tmp_path / "run", resume=True)
    assert stop.value.path == tmp_path / "run"
    run_recipe(recipe, tmp_path / "run", resume=True)
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert "run begins" in log
    assert "run goes on" in log
    assert "ZeroDivisionError" in log


def test_no_number_that_is_not_finite_is_written() -> None:
    result = TaskResult("perplexity", "perplexity", float("inf"), float("nan"), 3, {}, {"a": float("inf"), "b": 1.0})
    row = quality(result)
    assert row["value"] is None
    assert row["stderr"] is None
    assert row["by_group"] == {"a": None, "b": 1.0}
    assert quality(TaskResult("vqa", "accuracy", 0.5, None, 3))["value"] == 0.5


def test_what_is_evaluated() -> None:
    assert tasks_of(Recipe()) == ("vqa",)
    assert tasks_of(Recipe(model="m")) == ()
    assert tasks_of(Recipe(model="m", test="a.txt")) == ("perplexity",)
    assert tasks_of(Recipe(model="m", test="wiki.test.raw")) == ("perplexity",)
    assert tasks_of(Recipe(model="m", test="a.txt.gz")) == ("perplexity",)
    assert tasks_of(Recipe(model="m", test="a.jsonl.gz")) == ("vqa",)
    assert tasks_of(Recipe(model="m", test="a.jsonl")) == ("vqa",)
    assert tasks_of(Recipe(model="m", test="a.jsonl", task=("perplexity",))) == ("perplexity",)


def test_importance_options_of_the_right_kind() -> None:
    for options in ({"epsilon": 1}, {"epsilon": 0.5, "draws": 2, "replay": False}, {}):
        Recipe(importance_options=options).method().check_options()
    Recipe(importance="first-order", importance_options={"variant": "norm"}).method().check_options()


def test_probes_of_blocks_say_nothing_of_single_layers() -> None:
    Recipe(importance_options={"probe": "block"}).method().check_options()
    with pytest.raises(InvalidOption, match="granularity"):
        Recipe(importance_options={"probe": "block"}, granularity="layer").method().check_options()
