"""What a recipe measures: options checked against the task's class, several tests, each rehearsed first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import picos
import pytest
import torch
import yaml
from console import Command, prose, questions

from ecoflap.data.class_names import class_names, class_templates
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.evaluation import TASKS, Task, TaskResult, TestData
from ecoflap.model.checkpoint import load
from ecoflap.run.evaluations import check_evaluations, evaluate, evaluations_of, options_of, rehearse
from ecoflap.run.recipe import Recipe
from ecoflap.support.progress import Silent
from ecoflap.support.registry import Entry


@dataclass(frozen=True)
class Spy(Task):
    """A task that says what it was called with."""

    takes: ClassVar[tuple[str, ...]] = ("columns", "classes")

    rule: str = "auto"
    shots: int = 0
    ratio: float | None = None
    fast: bool = False

    def run(self, model: Any, processor: Any, test: TestData) -> TaskResult:
        return TaskResult("spy", "accuracy", 1.0, None, test.samples or 1, vars(test) | vars(self))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS._entries, "spy", Entry(f"{__name__}:Spy"))
    return "spy"


def test_options_are_the_fields_of_the_class(task: str) -> None:
    assert list(options_of(task)) == ["rule", "shots", "ratio", "fast"]
    for name in TASKS:
        assert "progress" not in options_of(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shot": 5}, r"task 'spy' has no option 'shot': did you mean 'shots'\? choose from rule, shots, ratio, fast"),
        ({"shots": 2.5}, r"task option shots=2.5: it should be a valid integer"),
        ({"shots": "many"}, r"task option shots=many: it should be a valid integer"),
        ({"shots": True}, r"task option shots=True: the value can't be true or false"),
        ({"fast": "perhaps"}, r"task option fast=perhaps: it should be a valid boolean"),
        ({"ratio": "half"}, r"task option ratio=half: it should be a valid number"),
    ],
)
def test_options_are_checked(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        check_evaluations(Recipe.parse({"model": "m", "task": task, "task_options": options}))


def test_what_no_task_takes_is_refused(task: str) -> None:
    check_evaluations(Recipe.parse({"model": "m", "task": [task, "vqa"], "test_prompt": "{question}"}))
    with pytest.raises(InvalidOption, match="test_prompt is given, but task 'spy' does not take it"):
        check_evaluations(Recipe.parse({"model": "m", "task": task, "test_prompt": "{question}"}))
    with pytest.raises(InvalidOption, match="nothing is evaluated"):
        check_evaluations(Recipe.parse({"model": "m", "task_options": {"rule": "x"}}))


SEVERAL: dict[str, Any] = {
    "model": "m",
    "classes": ["one", "two"],
    "sequence_length": 9,
    "evaluations": [
        {"name": "first", "task": "spy", "test": "a.jsonl", "samples": 7, "options": {"rule": "exact"}},
        {"task": "spy", "columns": {"question": "q"}, "classes": ["a", "b", "c"], "sequence_length": 5},
    ],
}


def test_several_evaluations(task: str) -> None:
    first, second = evaluations_of(Recipe.parse(SEVERAL))
    assert (first.name, first.test, first.samples, first.sequence_length) == ("first", "a.jsonl", 7, 9)
    assert (first.options, first.classes) == ({"rule": "exact"}, ("one", "two"))
    assert (second.name, second.samples, second.sequence_length, second.classes) == ("spy", None, 5, ("a", "b", "c"))
    limited = evaluations_of(Recipe.parse({**SEVERAL, "test_samples": 5, "task_options": {"rule": "soft", "shots": 2}}))
    assert [entry.samples for entry in limited] == [5, 5]
    assert [entry.options for entry in limited] == [{"rule": "exact", "shots": 2}, {"rule": "soft", "shots": 2}]
    assert [entry.samples for entry in evaluations_of(Recipe.parse({**SEVERAL, "test_samples": 100}))] == [7, 100]
    chosen = Recipe.parse({**SEVERAL, "task": "first"})
    assert [entry.name for entry in evaluations_of(chosen)] == ["first"]
    with pytest.raises(UnknownName, match="unknown evaluation of this recipe 'frist': did you mean 'first'"):
        Recipe.parse({**SEVERAL, "task": "frist"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "x.jsonl", "evaluations": [{"task": "vqa"}]}, "test and evaluations are both given"),
        ({"evaluations": [{"task": "vqa", "sampels": 3}]}, r"unknown field 'sampels': did you mean 'samples'\?"),
        ({"evaluations": [{"name": "x"}]}, "evaluations 0 task"),
        ({"evaluations": [{"task": "vqa"}, {"task": "vqa"}]}, "'vqa' appears twice"),
        ({"evaluations": [{"task": "vqa", "samples": 0}]}, "evaluations 0 samples"),
    ],
)
def test_evaluations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        Recipe.parse({"model": "m", **change})


def test_an_entry_may_not_say_what_its_task_does_not_take() -> None:
    recipe = Recipe.parse({"model": "m", "evaluations": [{"name": "p", "task": "perplexity", "classes": ["a", "b"]}]})
    with pytest.raises(InvalidOption, match="evaluation 'p': task 'perplexity' takes no classes"):
        check_evaluations(recipe)


def test_every_evaluation_that_cannot_work_is_named(tmp_path: Path) -> None:
    checkpoint = load(str(picos.write_checkpoint("llama", tmp_path / "llama")))
    text = prose(tmp_path / "prose.txt")
    entries = [
        {"name": "good", "task": "perplexity", "test": str(text), "sequence_length": 12},
        {"name": "gone", "task": "perplexity", "test": "nowhere.txt"},
        {"name": "long", "task": "perplexity", "test": str(text), "sequence_length": 10**6},
    ]
    recipe = Recipe.parse({"model": "m", "evaluations": entries})
    with pytest.raises(Exception, match="2 of 3 evaluations can't run") as refused:
        rehearse(checkpoint, recipe)
    for words in ("evaluation 'gone': no file", "evaluation 'long': a sequence length of 1000000"):
        assert words in str(refused.value)
    assert "good" not in str(refused.value)
    rehearse(checkpoint, Recipe.parse({"model": "m", "evaluations": entries[:1]}))


@dataclass(frozen=True)
class Broken(Task):
    def run(self, model: Any, processor: Any, test: TestData) -> TaskResult:
        raise IndexError("list index\nout of range")


def test_a_model_that_fails_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS._entries, "broken", Entry(f"{__name__}:Broken"))
    checkpoint = load(str(picos.write_checkpoint("llama", tmp_path / "llama")))
    message = r"task 'broken' can't work on LlamaForCausalLM with x.txt \(IndexError: list index out of range\)"
    with pytest.raises(InvalidOption, match=message):
        rehearse(checkpoint, Recipe.parse({"model": "m", "task": "broken", "test": "x.txt"}))


def test_a_task_that_was_not_named_is_said_to_be_a_guess(run: Command, tmp_path: Path) -> None:
    model, text = picos.write_checkpoint("vit", tmp_path / "vit"), tmp_path / "texts"
    text.mkdir()
    prose(text / "a.txt")
    run("evaluate", model, "--test", text).refused("task 'perplexity'", "no task is named", "--task")
    named = run("evaluate", model, "--test", text, "--task", "perplexity").refused("task 'perplexity'")
    assert "no task" not in named


def test_recipes_over_each_other(run: Command, tmp_path: Path) -> None:
    model = picos.write_checkpoint("blip2_t5", tmp_path / "blip2")
    data = questions(tmp_path / "vqa")
    names = [
        {"name": "exact", "task": "vqa", "test": str(data), "options": {}, "samples": 5},
        {"name": "asked", "task": "vqa", "test": str(data), "prompt": "{question} answer :"},
    ]
    base = {"model": str(model), "calibration": str(data), "samples": 6, "batch_size": 3, "evaluations": names}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "method.yaml").write_text(yaml.safe_dump({"criterion": "magnitude", "importance": "uniform"}))
    files = ("--recipe", "base.yaml", "--recipe", "method.yaml")
    run("prune", *files, "--sparsity", 0.4, "-o", "run", "--quiet").well()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert {name: row["n"] for name, row in metrics["pruned"].items()} == {"exact": 5, "asked": 12}
    assert metrics["pruned"]["asked"]["settings"]["prompt_template"] == "{question} answer :"
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text("utf-8"))
    assert (recorded["criterion"], recorded["sparsity"]) == ("magnitude", 0.4)
    found = json.loads(run("evaluate", "run/model", *files, "--limit", 3, "--json").well().out)
    assert {name: row["n"] for name, row in found.items()} == {"exact": 3, "asked": 3}
    one = json.loads(run("evaluate", "run/model", *files, "--task", "asked", "--json").well().out)
    assert one["asked"]["value"] == metrics["pruned"]["asked"]["value"]
    run("prune", "--recipe", "run/recipe.yaml", "-o", "again", "--quiet").well()
    assert "--recipe recipe.yaml" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_what_was_chosen_is_printed(run: Command, tmp_path: Path) -> None:
    model = picos.write_checkpoint("blip2_t5", tmp_path / "blip2")
    data = questions(tmp_path / "vqa")
    job = ("prune", model, "--calibration", data, "--samples", 4, "--criterion", "magnitude", "--importance", "uniform")
    said = run(*job, "-o", "a").well().err
    for words in ("calibration: 4 samples of ", "image=image", "question=question", "(guessed"):
        assert words in said
    assert "objective: seq2seq (by the model's class" in said
    told = run(*job, "--columns", "answer=answer", "--objective", "seq2seq", "-o", "b").well().err
    assert "guessed" not in told
    assert "objective: seq2seq\n" in told
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text("utf-8"))
    assert metrics["calibration"]["objective"] == "seq2seq"


def test_class_names_and_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("red fox\n\n grey fox \n", "utf-8")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\nart of a {}.\n", "utf-8")
    assert class_names(("names.txt",)) == ("red fox", "grey fox")
    assert class_names(("a", "b")) == ("a", "b")
    assert class_names(None) is class_templates(None) is None
    assert class_templates(("prompts.txt",)) == ("a photo of a {}.", "art of a {}.")
    assert class_templates(("a {}",)) == ("a {}",)
    with pytest.raises(InvalidOption, match=r"can't read the file 'gone\.txt'"):
        class_names(("gone.txt",))
    (tmp_path / "one.txt").write_text("alone\n", "utf-8")
    with pytest.raises(InvalidOption, match="at least two class names"):
        class_names(("one.txt",))
    for bad in (("a", "b {}"), ("{} {}",), ("a photo of it",)):
        with pytest.raises(InvalidOption, match=r"one \{\} is needed"):
            class_templates(bad)


def test_files_beside_a_recipe_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "names.txt").write_text("a\nb\n", "utf-8")
    entry = {"task": "vqa", "classes": "names.txt", "class_prompts": ["a {}"]}
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": "m", "classes": "names.txt", "evaluations": [entry]}))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("recipes/r.yaml")
    assert recipe.classes == ("recipes/names.txt",)
    assert recipe.evaluations is not None
    assert recipe.evaluations[0].classes == ("recipes/names.txt",)
    assert recipe.evaluations[0].class_prompts == ("a {}",)
    assert class_names(recipe.classes) == ("a", "b")
    (tmp_path / "names.txt").write_text("c\nd\n", "utf-8")  # the current folder comes first
    assert class_names(Recipe.load("recipes/r.yaml").classes) == ("c", "d")


def test_suites_of_lm_eval_are_tasks() -> None:
    assert Recipe.parse({"task": "lm_eval:arc_easy"}).task == ("lm_eval:arc_easy",)
    with pytest.raises(UnknownName, match="lm_eval:NAME"):
        Recipe.parse({"task": "lm_eval:"})


@dataclass(frozen=True)
class Rows(Task):
    """A task whose result is the batch size that it was given."""

    def run(self, model: Any, processor: Any, test: TestData) -> TaskResult:
        return TaskResult("rows", "rows", float(test.batch_size), None, 1, {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 32),
        ({"batch_size": 64}, 64),
        ({"test_batch_size": 3}, 3),
        ({"model": "x"}, 8),
        ({"model": "x", "batch_size": 2}, 2),
        ({"model": "x", "batch_size": 2, "test_batch_size": 16}, 16),
    ],
)
def test_rows_of_a_forward(fields: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._entries, "rows", Entry(f"{__name__}:Rows"))
    recipe = Recipe(task=("rows",), test="data", **fields)
    checkpoint: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), processor=None)
    (entry,) = evaluations_of(recipe)
    assert evaluate(checkpoint, entry, recipe, Silent()).value == expected


def test_the_batch_size_of_evaluate_is_the_tests(run: Command, tmp_path: Path) -> None:
    """Its two names are one option; ``batch_size`` of a recipe file holds where neither is said."""
    (tmp_path / "recipe.yaml").write_text("batch_size: 0\n", "utf-8")
    for name in ("--batch-size", "--test-batch-size"):
        run("evaluate", name, "0").refused("-batch-size: 0")
    run("evaluate", "--recipe", tmp_path / "recipe.yaml").refused("batch_size")
