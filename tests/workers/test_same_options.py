"""Workers that were started with different options are refused, before any of them computes or writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from console import llama_and_prose
from together import together

from ecoflap.errors import InvalidOption
from ecoflap.run.commands import evaluate_model, measure_to
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe
from ecoflap.support.progress import Silent
from ecoflap.support.workers import Workers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_and_prose(tmp_path_factory.mktemp("same"))


def recipe_of(folder: Path, **more: Any) -> Recipe:
    text = str(folder / "prose.txt")
    return Recipe.parse(
        {"model": str(folder / "llama"), "calibration": text, "samples": 4, "batch_size": 2, "sequence_length": 12,
         "importance": "zeroth-order", "importance_samples": 2, "test": text, "test_samples": 2, **more}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"importance_options": {"epsilon": 0.01}}, "option --importance-options"),
        ({"importance": "uniform"}, "option --importance"),
        ({"criterion": "magnitude"}, "option --criterion"),
        ({"exclude": ["model.layers.0"]}, "option --exclude"),
        ({"seed": 1}, "option --seed"),
    ],
)
def test_a_run_of_two_minds_is_refused(made: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    def work(workers: Workers) -> Path:
        return run_recipe(recipe_of(made, **({} if workers.first else more)), tmp_path / "run", workers=workers)

    with pytest.raises(InvalidOption, match=f"worker 1 has another {words} than worker 0"):
        together(2, work)
    assert not (tmp_path / "run").exists()


def test_other_commands_and_another_output_are_refused(made: Path, tmp_path: Path) -> None:
    same = recipe_of(made)

    def into_others(workers: Workers) -> Path:
        return run_recipe(same, tmp_path / f"run-{workers.rank}", workers=workers)

    def evaluate(workers: Workers) -> Any:
        return evaluate_model(recipe_of(made, test_samples=2 + workers.rank), Silent(), workers)

    def measure(workers: Workers) -> Any:
        recipe = recipe_of(made, importance_options={"draws": 1 + workers.rank})
        return measure_to(recipe, tmp_path / "i.json", Silent(), workers=workers)

    for work, words in ((into_others, "--output"), (evaluate, "--test-samples"), (measure, "--importance-options")):
        with pytest.raises(InvalidOption, match=f"worker 1 has another option {words} than worker 0"):
            together(2, work)
    assert list(tmp_path.iterdir()) == []
