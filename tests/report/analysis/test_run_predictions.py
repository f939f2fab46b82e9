"""predictions.json and its pictures: counts, examples, resume, odd names, unreadable data."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import picos
import pytest
from console import questions
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ecoflap.errors import OutputExists
from ecoflap.run import pipeline
from ecoflap.run.evaluations import Evaluation
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.predictions import EXAMPLES, KINDS, add_pictures, answers_of, compared, spread, thumbnail
from ecoflap.run.recipe import Recipe


def _record(index: int, score: float, prediction: str = "red") -> dict[str, object]:
    return {"index": index, "prediction": prediction, "truth": "red", "score": score}


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1)
)
def test_counts_are_those_of_brute_force(scores: list[tuple[float, float]]) -> None:
    dense = [_record(7 * i, a) for i, (a, _) in enumerate(scores)]
    pruned = [_record(7 * i, b) for i, (_, b) in enumerate(scores)]
    random.Random(0).shuffle(pruned)
    task = compared(dense, pruned)
    tally = Counter((a >= 0.5, b >= 0.5) for a, b in scores)
    assert task["counts"] == {
        "both_right": tally[True, True],
        "only_dense": tally[True, False],
        "only_pruned": tally[False, True],
        "both_wrong": tally[False, False],
    }
    assert [(row["dense_score"], row["pruned_score"]) for row in task["rows"]] == scores
    right = {"both_right": (1, 1), "only_dense": (1, 0), "only_pruned": (0, 1), "both_wrong": (0, 0)}
    for kind, found in task["examples"].items():
        assert len(found) == min(EXAMPLES, task["counts"][kind])
        for index in found:
            a, b = scores[index // 7]
            assert (a >= 0.5, b >= 0.5) == tuple(map(bool, right[kind]))


@given(st.integers(0, 100), st.integers(1, 12))
def test_examples_are_spread_over_all_rows(size: int, count: int) -> None:
    chosen = spread(range(size), count)
    assert len(chosen) == min(size, count)
    assert sorted(set(chosen)) == chosen
    if size > count:
        gaps = [b - a for a, b in zip(chosen, [*chosen[1:], size], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_only_records_with_one_truth_and_a_score_count() -> None:
    assert answers_of(None) is None
    assert answers_of([]) is None
    assert answers_of([{"index": 0, "prediction": "a dog", "truth": ["a dog", "the dog"], "score": 1.2}]) is None
    assert answers_of([{"index": 0, "prediction": "a", "truth": "b"}]) is None
    rows = [{"index": 3, "prediction": "a", "truth": "b", "score": 0.0, "question": "which ?"}]
    assert answers_of(rows) == rows


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(20, 10)], (20, 10)), ([(640, 480)], (160, 120)), ([(100, 400)], (40, 160)), ([(50, 50), (25, 25)], (104, 50))],
)
def test_pictures_are_small_and_keep_their_shape(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    made = thumbnail([Image.new("RGB", size, "blue") for size in sizes])
    assert made.size == expected
    assert made.getpixel((0, 0)) == (0, 0, 255)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    picos.write_checkpoint("blip2_t5", folder / "model")
    questions(folder / "data", count=12)
    return folder


def _recipe(made: Path, **more: object) -> Recipe:
    data = str(made / "data" / "questions.jsonl")
    fields = {"model": str(made / "model"), "calibration": data, "samples": 4, "importance": "first-order"}
    return Recipe.parse({**fields, "batch_size": 2, "test": data, **more})


def _tasks(run: Path) -> dict[str, dict[str, object]]:
    return json.loads((run / "predictions.json").read_text("utf-8"))["tasks"]


def test_a_run_leaves_answers_and_pictures(made: Path, tmp_path: Path) -> None:
    run = run_recipe(_recipe(made, test_samples=10), tmp_path / "run")
    (task,) = _tasks(run).values()
    source = [json.loads(line) for line in (made / "data" / "questions.jsonl").read_text("utf-8").splitlines()]
    assert len(task["rows"]) == sum(task["counts"].values()) == 10
    assert list(task["counts"]) == list(KINDS)
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    for when in ("dense", "pruned"):
        mean = sum(row[f"{when}_score"] for row in task["rows"]) / 10
        assert mean == pytest.approx(metrics[when]["vqa"]["value"])
    shown = {index for found in task["examples"].values() for index in found}
    for row in task["rows"]:
        asked = source[row["index"]]
        assert (row["question"], row["truth"], row["kind"]) == (asked["question"], asked["answer"], asked["kind"])
        assert (row["picture"] is not None) == (row["index"] in shown)
        if row["picture"]:
            with Image.open(run / row["picture"]) as picture, Image.open(made / "data" / asked["image"]) as original:
                assert picture.getpixel((3, 3)) == original.getpixel((3, 3))
    assert {path.name for path in (run / "pictures").iterdir()} == {
        Path(row["picture"]).name for row in task["rows"] if row["picture"]
    }


def test_resume_keeps_the_dense_answers_and_overwrite_removes_all(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_recipe(_recipe(made), tmp_path / "whole")
    calls = []
    original = pipeline.evaluate

    def failing(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "evaluate", failing)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(_recipe(made), tmp_path / "run")
    run = run_recipe(_recipe(made), tmp_path / "run", resume=True)
    assert len(calls) == 3  # the dense model was not asked again
    assert (run / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()
    for picture in (whole / "pictures").iterdir():
        assert (run / "pictures" / picture.name).read_bytes() == picture.read_bytes()
    (run / "analysis").mkdir()
    (run / "analysis" / "distributions.json").write_text("{}", "utf-8")
    with pytest.raises(OutputExists, match=r"distributions\.json"):  # no file of the run's
        run_recipe(_recipe(made, task=(), test=None), run, overwrite=True)
    (run / "analysis" / "distributions.json").unlink()
    again = run_recipe(_recipe(made, task=(), test=None), run, overwrite=True)
    assert not any((again / name).exists() for name in ("predictions.json", "pictures"))


def test_pictures_of_evaluations_with_odd_names(made: Path, tmp_path: Path) -> None:
    tasks = {
        name: compared([_record(2, 1.0)], [_record(2, 0.0)]) for name in ("../../a b", "a/b", "A:b", "vqa", "gone", "")
    }
    data = str(made / "data" / "questions.jsonl")
    entries = [Evaluation(task="vqa", name=name, test=data) for name in ("../../a b", "a/b", "A:b", "vqa")]
    gone = str(tmp_path / "gone.jsonl")
    add_pictures(tasks, [*entries, Evaluation(task="vqa", name="gone", test=gone)], 0, tmp_path / "run")
    names = [tasks[entry.name]["rows"][0]["picture"] for entry in entries]
    assert names == [f"pictures/{stem}-000002.png" for stem in ("a-b", "a-b-2", "A-b-3", "vqa")]
    assert all((tmp_path / "run" / name).is_file() for name in names)
    assert tasks["gone"]["rows"][0]["picture"] is None


@pytest.mark.parametrize("kind", ["jsonl", "folder", "parquet"])
def test_rows_by_index_of_any_source(made: Path, tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    from ecoflap.data.samples import SampleReader

    source = made / "data" / "questions.jsonl"
    if kind == "folder":
        source = tmp_path / "classes"
        for label in ("x", "y"):
            (source / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (4, 4), (40 * number, 0, 200 * (label == "y"))).save(source / label / f"{number}.png")
    elif kind == "parquet":
        source = tmp_path / "data.parquet"
        Dataset.from_dict({"text": [f"w{i}" for i in range(9)], "label": [str(i % 2) for i in range(9)]}).to_parquet(
            source
        )
    drawn = dict(SampleReader(source, samples=5, seed=1))
    reader = SampleReader(source, samples=None, seed=0)
    wanted = sorted(drawn, reverse=True)[:3]
    found = dict(reader.at(wanted))
    assert list(found) == wanted
    for index, sample in found.items():
        assert (sample.text, sample.label) == (drawn[index].text, drawn[index].label)
        if sample.images:
            assert sample.images[0].tobytes() == drawn[index].images[0].tobytes()
