"""The recipe: validation, what follows from other fields, and its round trips through YAML and the command line."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ecoflap
from ecoflap.allocation import RULES, allocate
from ecoflap.allocation.groups import LayerSize
from ecoflap.cli.app import Command
from ecoflap.cli.options import PANELS, with_recipe_options
from ecoflap.data.objectives import OBJECTIVES
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.evaluation import TASKS
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA
from ecoflap.report.records import reproduce
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.directory import RunDirectory
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.recipe import FILE_ONLY, Recipe

FULL: dict[str, Any] = {
    "model": "some where/model",
    "sparsity": 0.55,
    "max_sparsity": 0.7,
    "min_sparsity": 0.1,
    "importance": "first-order",
    "importance_options": {"variant": "fisher"},
    "granularity": "layer",
    "aggregate": "mean",
    "budget": "tower",
    "tower_sparsity": {"vision": 0.4, "language": 0.6},
    "rule": "linear",
    "spread": 0.2,
    "search": True,
    "search_options": {"rounds": 2, "by": "probes"},
    "criterion": "sparsegpt",
    "criterion_options": {"damping": 0.02},
    "compare": "matrix",
    "recover": True,
    "recover_options": {"steps": 5, "damping": 0.1},
    "tokens": "text+top",
    "top_tokens": 0.3,
    "expert_tokens": 64,
    "calibration": "data/it's.jsonl",
    "columns": {"question": "q 1", "answer": "7"},
    "prompt": "Q: {question} A:",
    "objective": "my.module:loss",
    "samples": 64,
    "importance_samples": 16,
    "importance_error": 0.2,
    "batch_size": 4,
    "sequence_length": 77,
    "window_start": "once",
    "include": ("qformer",),
    "exclude": ("*.fc2.weight", "lm_head"),
    "towers": ("model.layers",),
    "image_folder": "data/the pictures",
    "classes": ("classes.txt",),
    "class_prompts": ("a photo of a {}.", "a drawing of a {}."),
    "task": ("vqa", "perplexity", "lm_eval:arc_easy"),
    "task_options": {"rule": "exact", "shots": 5, "ratio": 0.5, "fast": True},
    "test": "held out.txt",
    "test_columns": {"question": "q 2"},
    "test_prompt": "{question}!",
    "test_image_folder": "pictures",
    "test_samples": 9,
    "test_batch_size": 5,
    "seed": 11,
    "device": "cpu",
    "device_map": "auto",
    "max_memory": {"0": "20GiB", "cpu": "8GiB"},
    "dtype": "bfloat16",
    "compute_dtype": "float32",
    "baseline": True,
    "offload_activations": True,
    "trust_remote_code": True,
}


def _from_shell(line: str) -> Recipe:
    """What ``ecoflap prune`` makes of a command line."""
    found: list[Recipe] = []
    app = typer.Typer()

    @app.command(cls=Command)
    @with_recipe_options()
    def prune(recipe: Recipe, output: str = "") -> None:
        found.append(recipe)

    words = shlex.split(line.replace("\\\n", " "))
    assert words[:2] == ["ecoflap", "prune"]
    app(words[2:], standalone_mode=False)
    return found[0]


def test_yaml_and_back(tmp_path: Path) -> None:
    recipe = Recipe.parse(FULL)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe.to_dict(), "versions": {"torch": "1"}, "fingerprint": "f"}), "utf-8")
    code = {"trust_remote_code": True, "objective": recipe.objective}  # a file is not trusted with it
    assert Recipe.load(path, code) == recipe
    assert Recipe.load(path, {**code, "seed": 12}) == recipe.model_copy(update={"seed": 12})
    assert set(FULL) | {"pattern", "allocation", "evaluations", "pruned"} == set(Recipe.model_fields)


def test_the_command_line_and_back() -> None:
    recipe = Recipe.parse(FULL)
    assert _from_shell(reproduce(recipe.to_dict())) == recipe


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pattern": "2:4"},
        {"pattern": "1:3"},
        {"importance_options": {"epsilon": 1e-05, "draws": 3, "replay": False}},
        {"importance": "runs/x/importance.json"},
        {"tower_sparsity": {"vision_model.encoder.layers": 0.25}},
        {"sparsity": 0.1 + 0.2},
        {"importance": "sensitivity"},
        {"importance": "sensitivity", "search": False},
    ],
)
def test_the_resolved_recipe_through_the_command_line(values: dict[str, Any]) -> None:
    recipe = Recipe.parse(values).resolved()
    again = _from_shell(reproduce(recipe.to_dict()))
    assert again == recipe
    assert again.resolved() == recipe


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sparsity": st.floats(0, 0.99),
            "min_sparsity": st.floats(0, 1),
            "seed": st.integers(0, 2**40),
            "samples": st.integers(32, 10**6),
            "prompt": st.text(min_size=1).filter(lambda t: not t.startswith("-") and t.isprintable()),
            "criterion": st.sampled_from(["wanda", "sparsegpt", "magnitude"]),
            "exclude": st.lists(st.from_regex(r"[a-z*.]{1,9}", fullmatch=True)).map(tuple),
            "tower_sparsity": st.dictionaries(st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), st.floats(0, 1)),
        },
    )
)
def test_any_recipe_survives_both_ways(values: dict[str, Any]) -> None:
    recipe = Recipe.parse(values).resolved()
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert _from_shell(reproduce(recipe.to_dict())) == recipe


def test_every_field_is_an_option_under_one_heading() -> None:
    listed = [name for names in PANELS.values() for name in names]
    fields = {*Grid.model_fields, *UPop.model_fields}
    assert sorted(listed) == sorted(fields - {"model", *FILE_ONLY})
    assert set(PANELS["Grid"]) == set(Grid.model_fields) - set(Recipe.model_fields) - {"train"}  # as in a training
    assert set(PANELS["Training"]) == set(UPop.model_fields) - set(Recipe.model_fields)


def test_resolved() -> None:
    assert Recipe().resolved().max_sparsity == 0.6
    assert Recipe(sparsity=0.95).resolved().max_sparsity == 1.0
    assert Recipe(sparsity=0.7).resolved().max_sparsity == 0.8
    assert Recipe(samples=8).resolved().importance_samples == 8
    fixed = Recipe(pattern="1:4", importance_options={"epsilon": 0.1}).resolved()
    assert (fixed.sparsity, fixed.importance, fixed.importance_options) == (0.75, "uniform", {})
    assert Recipe(pattern="2:4", sparsity=0.5, importance="uniform").resolved().sparsity == 0.5


def test_a_search_is_resolved() -> None:
    assert Recipe().resolved().search is None
    assert Recipe(importance="sensitivity").resolved().search is True
    assert Recipe(importance="sensitivity", search=False).resolved().search is False
    searched = Recipe(importance="owl", search=True).resolved()
    assert (searched.search, searched.max_sparsity) == (True, None)
    with pytest.raises(InvalidOption, match="search: pattern 2:4 fixes every layer's sparsity"):
        Recipe(pattern="2:4", search=True).resolved()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("", "none"),
        ("--offload-activations", "cpu"),
        ("--offload-activations --seed 3", "cpu"),
        ("--no-offload-activations --seed 3", "none"),
        ("--offload-activations disk --seed 3", "disk"),
        ("--offload-activations none", "none"),
    ],
)
def test_offloading_had_no_value_once(words: str, kind: str) -> None:
    assert _from_shell(f"ecoflap prune {words}").offload_activations == kind


def test_offloading_was_true_or_false_once() -> None:
    assert Recipe.parse({"offload_activations": True}).offload_activations == "cpu"
    assert Recipe.parse({"offload_activations": False}) == Recipe.parse({})


def test_one_name_is_a_list_of_one() -> None:
    recipe = Recipe.parse({"task": "vqa", "exclude": "lm_head", "towers": "model.layers"})
    assert (recipe.task, recipe.exclude, recipe.towers) == (("vqa",), ("lm_head",), ("model.layers",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"recipe: sparsity: 1.0 should be less than 1"),
        ({"sparsity": "many"}, r"recipe: sparsity: 'many' is not a number"),
        ({"samples": 1.5}, r"recipe: samples: 1.5 is not a whole number"),
        ({"sparcity": 0.5}, r"recipe: unknown field 'sparcity': did you mean 'sparsity'\?"),
        ({"qqq": 0.5}, r"recipe: unknown field 'qqq': 'ecoflap prune --help' lists them"),
        ({"tower_sparsity": [1]}, r"recipe: tower_sparsity: \[1\] should be a mapping"),
        ({"tower_sparsity": {"vision": "low"}}, r"recipe: tower_sparsity vision: 'low' is not a number"),
        ({"dtype": "int8"}, r"recipe: dtype: int8 should be 'auto', 'float32'"),
        ({"sparsity": 0.5, "max_sparsity": 0.4}, r"recipe: max_sparsity 0.4 is below sparsity 0.5"),
        ({"samples": 8, "importance_samples": 9}, r"recipe: importance_samples 9 is more than samples 8"),
        ({"pattern": "4:2"}, r"recipe: pattern 4:2 is impossible"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message) as refused:
        Recipe.parse(values)
    assert "\n" not in str(refused.value)


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownName, match="unknown criterion 'wandas': did you mean 'wanda'"):
        Recipe.parse({"criterion": "wandas"})
    with pytest.raises(UnknownName, match="did you mean 'perplexity'"):
        Recipe.parse({"task": ["perplexty"]})
    with pytest.raises(UnknownName, match="did you mean 'first-order'"):
        Recipe.parse({"importance": "first_order"})


def test_an_allocation_says_the_sparsity(tmp_path: Path) -> None:
    layer = {"name": "a.weight", "tower": "t", "modality": "language", "block": "t.0", "shape": [4, 5], "weights": 20}
    data = {
        "format": 1, "sparsity": 0.5, "max_sparsity": 0.6, "granularity": "block", "aggregate": "sum",
        "pattern": "unstructured", "total_weights": 40, "zeros": 20,
        "layers": [{**layer, "zeros": 4}, {**layer, "name": "b.weight", "zeros": 13}],
    }  # fmt: skip
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(data), "utf-8")
    resolved = Recipe(allocation=str(path)).resolved()
    assert (resolved.sparsity, resolved.max_sparsity) == (0.425, 0.6)
    assert Recipe.parse(resolved.to_dict()).resolved() == resolved
    with pytest.raises(InvalidOption, match=r"makes a sparsity of 0.425, not 0.5"):
        Recipe(allocation=str(path), sparsity=0.5).resolved()


def test_help_names_all_that_is_registered() -> None:
    text = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text("utf-8")
    for field, table in (
        ("objective", OBJECTIVES), ("task", TASKS), ("importance", IMPORTANCES), ("criterion", CRITERIA),
        ("rule", RULES),
    ):  # fmt: skip
        said = Recipe.model_fields[field].description or ""
        line = next(line for line in text.splitlines() if line.startswith(f"| `--{field}` |"))
        assert [name for name in table if name not in said or name not in line] == []


def test_a_run_without_a_criterion_was_pruned_by_wanda(tmp_path: Path) -> None:
    """The default was Wanda before it was ADMM: a run that an early version recorded keeps its meaning."""
    values = {name: value for name, value in Recipe().resolved().to_dict().items() if name != "criterion"}
    run = tmp_path / "recipe.yaml"
    run.write_text(yaml.safe_dump({**values, "versions": {"ecoflap": "0.0.1"}, "fingerprint": "0"}), "utf-8")
    assert Recipe.load(run).criterion == "wanda"
    assert Recipe.load(run, {"criterion": "sparsegpt"}).criterion == "sparsegpt"
    own = tmp_path / "own.yaml"
    own.write_text("sparsity: 0.6\n", "utf-8")
    assert Recipe.load(own).criterion == "admm"


def test_a_run_begun_with_the_former_default_goes_on_with_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("criterion: wanda\n", "utf-8")
    directory = RunDirectory(tmp_path)
    assert directory.settled(Recipe().resolved()).criterion == "wanda"
    assert directory.settled(Recipe(criterion="admm").resolved()).criterion == "admm"
    (tmp_path / "recipe.yaml").write_text("criterion: sparsegpt\n", "utf-8")
    assert directory.settled(Recipe().resolved()).criterion == "admm"  # told as a difference, as before


def test_a_run_goes_on_with_the_tokens_that_it_recorded(tmp_path: Path) -> None:
    """Also one of a version in which ADMM counted all."""
    run = RunDirectory(tmp_path)
    for tokens in ("all", "weighted", "balanced"):
        (tmp_path / "recipe.yaml").write_text(f"criterion: admm\nimportance: uniform\ntokens: {tokens}\n")
        assert run.settled(Recipe(importance="uniform")).tokens == tokens
    assert run.settled(Recipe(importance="uniform", tokens="text")).tokens == "text"


def test_the_default_criterion_is_recorded() -> None:
    assert Recipe().resolved().to_dict()["criterion"] == "admm"
    assert Recipe().resolved().method().pruning.criterion == "admm"


@pytest.mark.parametrize("function", [ecoflap.prune, ecoflap.write_model_card])
def test_python_and_the_command_line_have_one_default(function: Any) -> None:
    assert inspect.signature(function).parameters["criterion"].default == Recipe().criterion


def test_towers_of_their_own_sparsity_have_their_own_cap() -> None:
    own = Recipe(tower_sparsity={"vision": 0.4, "language": 0.6})
    assert own.resolved().max_sparsity is None
    layers = [LayerSize(f"{t}{i}", t, f"{t}{i}", 101, float(i + 1)) for t in ("vision", "language") for i in range(4)]
    found = allocate(layers, **{name: value for name, value in own.shares().items() if value is not None})
    highest = {t: max(row.sparsity for row in found.layers if row.tower == t) for t in ("vision", "language")}
    assert highest["language"] > 0.6  # refused once, with the cap of the whole model
    assert all(highest[tower] <= cap for tower, cap in (("vision", 0.5), ("language", 0.7)))
    assert Recipe(tower_sparsity={"vision": 0.4}, max_sparsity=0.55).resolved().max_sparsity == 0.55
