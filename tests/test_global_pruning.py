"""Global criteria by recipe and command line: what they fix, what is refused, and how a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import picos
import pytest
import torch
import yaml
from console import TEXT, Command, model_weights, prose, questions, same_result
from transformers import LlavaForConditionalGeneration

from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.pruning import whole_model
from ecoflap.run import pipeline
from ecoflap.run.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("global")
    picos.write_checkpoint("llama", folder / "llama")
    picos.write_checkpoint("llava", folder / "llava", torch.bfloat16)
    return SimpleNamespace(
        folder=folder, llama=folder / "llama", llava=folder / "llava", prose=prose(folder / "prose.txt"),
        questions=questions(folder / "vqa"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(made: SimpleNamespace) -> Path:
    """What ``iterative-gradient`` makes of the model where nothing stops it."""
    recipe = Recipe(model=str(made.llama), calibration=str(made.prose), samples=6, importance_samples=4, batch_size=2,
                    sequence_length=12, criterion="iterative-gradient")  # fmt: skip
    return pipeline.run_recipe(recipe, made.folder / "whole")


def test_what_a_global_criterion_fixes() -> None:
    recipe = Recipe(criterion="iterative-gradient", budget="tower", criterion_options={"rounds": 2})
    resolved = recipe.resolved()
    assert (resolved.importance, resolved.max_sparsity, resolved.budget) == ("uniform", 1.0, "tower")
    assert Recipe.parse(resolved.to_dict()).resolved() == resolved
    assert Recipe(criterion="global-magnitude", importance="uniform", max_sparsity=1.0).resolved().sparsity == 0.5


@pytest.mark.parametrize("criterion", ["global-magnitude", "iterative-gradient"])
@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("importance", "first-order", "leave it out or give uniform"),
        ("importance_options", {"draws": 2}, "leave it out"),
        ("allocation", "nowhere.json", "leave it out"),
        ("pattern", "2:4", "leave it out or give unstructured"),
        ("compare", "row", "leave it out"),
        ("max_sparsity", 0.6, "leave it out or give 1.0"),
        ("min_sparsity", 0.2, "leave it out or give 0.0"),
        ("granularity", "tower", "leave it out or give block"),
        ("aggregate", "mean", "leave it out"),
    ],
)
def test_what_could_have_no_effect_is_refused(criterion: str, field: str, value: object, hint: str) -> None:
    with pytest.raises(InvalidOption, match="decides every layer's sparsity itself") as refused:
        Recipe.parse({"criterion": criterion, field: value}).resolved()
    assert f"so {field} " in str(refused.value)
    assert hint in str(refused.value)


def test_options_of_criteria_are_checked_before_anything_is_written(run: Command, made: SimpleNamespace) -> None:
    base = ["prune", made.llama, "--calibration", made.prose, *TEXT, "-o", "run"]
    for criterion, option, words in (
        ("iterative-gradient", "round=2", ("has no option 'round'", "its options are rounds")),
        ("iterative-gradient", "rounds=0", ("rounds must be at least 1",)),
        ("iterative-gradient", "rounds=2.5", ("criterion option rounds=2.5", "a whole number")),
        ("sparsegpt", "damping=big", ("criterion option damping=big", "a number")),
        ("sparsegpt", "slab=true", ("criterion option slab=True", "a whole number")),
        ("sparsegpt", "damping=0", ("damping must be above 0",)),
        ("wanda", "slab=4", ("has no option 'slab'", "its options are order")),
        ("sparsegpt", "damping", ("--criterion-options", "write NAME=VALUE")),
    ):
        run(*base, "--criterion", criterion, "--criterion-options", option).refused(*words)
    assert not Path("run").exists()
    with pytest.raises(UnknownName, match="did you mean 'global-magnitude'"):
        Recipe.parse({"criterion": "global-magnitud"})


@pytest.mark.usefixtures("pageless")
def test_options_of_sparsegpt_reach_it(run: Command, made: SimpleNamespace) -> None:
    base = [
        "prune", made.llama, "--calibration", made.prose, *TEXT, "--importance", "uniform", "--criterion", "sparsegpt",
    ]  # fmt: skip
    run(*base, "-o", "plain").well()
    run(*base, "--criterion-options", "damping=0.01", "--criterion-options", "slab=128", "-o", "same").well()
    run(*base, "--criterion-options", "damping=0.5", "-o", "damped").well()
    run(*base, "--criterion-options", "slab=8", "-o", "slabs").well()
    plain, same, damped, slabs = (model_weights(Path(name) / "model") for name in ("plain", "same", "damped", "slabs"))
    assert all(torch.equal(same[name], value) for name, value in plain.items())
    assert any(not torch.equal(damped[name], value) for name, value in plain.items())
    assert any(not torch.equal(slabs[name], value) for name, value in plain.items())
    recorded = yaml.safe_load(Path("damped/recipe.yaml").read_text("utf-8"))
    assert recorded["criterion_options"] == {"damping": 0.5}


def test_global_magnitude_needs_no_data_and_writes_what_each_layer_got(run: Command, made: SimpleNamespace) -> None:
    run("prune", made.llava, "--criterion", "global-magnitude", "--sparsity", 0.3, "-o", "run").well()
    allocation = json.loads(Path("run/allocation.json").read_text("utf-8"))
    model = LlavaForConditionalGeneration.from_pretrained("run/model")
    shares = set()
    for row in allocation["layers"]:
        zeros = int((model.get_parameter(row["name"]) == 0).sum())
        assert row["zeros"] == zeros
        assert row["achieved"] == zeros / row["weights"]
        shares.add(row["achieved"])
    assert len(shares) > len(allocation["layers"]) / 2
    total = allocation["total_weights"]
    assert allocation["zeros"] == total - round(0.7 * total)
    assert model.get_parameter(allocation["layers"][0]["name"]).dtype == torch.bfloat16
    again = yaml.safe_load(Path("run/recipe.yaml").read_text("utf-8"))
    assert (again["importance"], again["criterion"]) == ("uniform", "global-magnitude")
    assert "global-magnitude" in Path("run/report.html").read_text("utf-8")


@pytest.mark.usefixtures("pageless")
def test_each_tower_by_itself(run: Command, made: SimpleNamespace) -> None:
    run("prune", made.llava, "--calibration", made.questions, "--samples", 4, "--batch-size", 2, "-o", "run",
        "--criterion", "iterative-gradient", "--budget", "tower", "--tower-sparsity", "vision=0.25").well()  # fmt: skip
    metrics = json.loads(Path("run/metrics.json").read_text("utf-8"))
    towers = {tower["modality"]: tower["sparsity"] for tower in metrics["sparsity"]["towers"].values()}
    assert towers == {"vision": pytest.approx(0.25, abs=1e-4), "language": pytest.approx(0.5, abs=1e-4)}


class _Crash(Exception):
    pass


def _failing(function: Callable[..., object], at: int) -> Callable[..., object]:
    calls = iter(range(10**9))

    def wrapped(*arguments: object, **named: object) -> object:
        if next(calls) == at:
            raise _Crash("hail")
        return function(*arguments, **named)

    return wrapped


@pytest.mark.parametrize(
    ("place", "name", "at", "rounds"),
    [
        (whole_model, "visit_gradients", 0, 0),
        (whole_model, "visit_gradients", 4, 1),
        (whole_model._Cutter, "_apply", 1, 2),
        (whole_model, "_packed", 50, 2),
        (whole_model, "achieved", 0, 3),
    ],
)
@pytest.mark.usefixtures("pageless")
def test_a_killed_run_ends_with_the_same_bits(
    run: Command, made: SimpleNamespace, whole: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str,
    at: int, rounds: int,
) -> None:  # fmt: skip
    base = ["prune", made.llama, "--calibration", made.prose, *TEXT, "--criterion", "iterative-gradient"]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, _failing(getattr(place, name), at))
        assert run(*base, "-o", "run").code == 1
    assert len(list(Path("run/journal/blocks").glob("round-*.safetensors"))) == rounds
    run(*base, "-o", "run", "--criterion-options", "rounds=2", "--resume").refused("criterion_options rounds")
    run(*base, "-o", "run", "--resume").well()
    same_result(whole, Path("run"))


@pytest.mark.usefixtures("pageless")
def test_a_run_that_is_killed_once_it_is_pruned(
    run: Command, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then allocation.json has the shares that were made, of which the sums are the budgets still."""
    base = ["prune", made.llama, "--criterion", "global-magnitude", "--sparsity", "0.4"]
    run(*base, "-o", "whole").well()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save", _failing(pipeline.save, 0))
        assert run(*base, "-o", "run").code == 1
    run(*base, "-o", "run", "--resume").well()
    same_result(Path("whole"), Path("run"))
