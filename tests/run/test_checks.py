"""What is refused before a model is loaded, and what of the imports that needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import picos
import pytest
from console import prose

from ecoflap.errors import AnatomyError, CalibrationError, EcoflapError, StorageError
from ecoflap.model.replace import check_replaceable
from ecoflap.run import loading
from ecoflap.run import prepare as preparing
from ecoflap.run.checks import check_data, check_evaluated, check_measured, check_recipe
from ecoflap.run.compare.folder import GridDirectory
from ecoflap.run.directory import RunDirectory
from ecoflap.run.finetune.folder import FinetuneDirectory
from ecoflap.run.prepare import by_options
from ecoflap.run.recipe import Recipe

_IMPORTS = """
import sys
from ecoflap.errors import EcoflapError
from ecoflap.run.checks import check_data, check_evaluated, check_recipe
from ecoflap.run.finetune.checks import check_finetune
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.recipe import Recipe

def refused(check, heavy, **fields):
    try:
        check((Finetune if check is check_finetune else Recipe)(**fields).resolved())
    except EcoflapError as error:
        print(error)
    else:
        raise SystemExit(f"{fields} were not refused")
    found = [name for name in heavy if name in sys.modules]
    assert not found, (fields, found)

models = ("transformers.modeling_utils", "transformers.tokenization_utils_base", "datasets")
refused(check_recipe, ("torch", *models), model="/nosuch")
refused(check_recipe, ("torch", *models), model="nosuch", criterion="magnitude", importance="uniform")  # asks the hub
refused(check_recipe, ("torch", *models), calibration="nosuch.jsonl")
refused(check_finetune, ("torch", *models), model=sys.argv[2], train="nosuch.jsonl")
refused(check_evaluated, ("torch", *models), test="nosuch.jsonl", task="vqa")
refused(check_recipe, models, importance_options={"epsilon": -1})
refused(check_recipe, models, criterion_options={"nosuch": 1})
refused(check_recipe, models, task="perplexity", task_options={"shots": 5}, test=sys.argv[1])
refused(check_data, (*models, "ecoflap.run.prepare"), calibration=sys.argv[1], columns={"image": "x"})
"""


def test_what_is_refused_needs_no_models_of_transformers_and_paths_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, str(prose(tmp_path / "prose.txt")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "./nosuch"}, "no model folder './nosuch'"),
        ({"model": "someone/model"}, "the hub cannot be reached for 'someone/model'"),
        ({"calibration": "nosuch.txt"}, "no file or folder 'nosuch.txt'"),
        ({"test": "nosuch.txt"}, "no file or folder 'nosuch.txt'"),
        ({"image_folder": "nosuch"}, "image folder nosuch is not there"),
        ({"task": "perplexity", "task_options": {"shots": 1}}, "has no option 'shots'"),
        ({"importance": "first-order", "importance_options": {"variant": "x"}}, "first-order variant 'x'"),
        ({"device_map": "nosuch"}, "nosuch"),
        ({"objective": "nosuch_module:loss"}, "'nosuch_module:loss' cannot be imported"),
        ({"min_sparsity": 0.6}, "0.5 is out of reach: min_sparsity is 0.6"),
    ],
)
def test_places_and_options(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(EcoflapError, match=words):
        check_recipe(Recipe(**fields).resolved())


def test_broken_test_data_is_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(preparing, "load_checkpoint", load)
    data = tmp_path / "data.jsonl"
    data.write_text("{broken", "utf-8")
    tested = Recipe(test=str(data), task=("vqa",))
    with pytest.raises(CalibrationError, match=r"data\.jsonl"):
        check_data(tested)
    with pytest.raises(CalibrationError, match=r"data\.jsonl"):
        preparing.prepare(tested.resolved())
    with pytest.raises(CalibrationError, match=r"data\.jsonl"):
        preparing.prepare(Recipe(calibration=str(data)).resolved())
    with pytest.raises(CalibrationError, match=r"data\.jsonl"):
        check_evaluated(tested)
    with pytest.raises(CalibrationError, match=r"x\.jsonl"):
        check_measured(Recipe(calibration="x.jsonl"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("vqa", "needs columns with questions"),
        ("multiple-choice", "its choices and the right one"),
        ("captioning", "has no images"),
        ("zero-shot", "has no images"),
    ],
)
def test_a_text_is_no_test_of_pictures_or_questions(task: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=words):
        check_data(Recipe(test=str(prose(tmp_path / "prose.txt")), task=(task,)))


def test_a_table_is_no_text(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "what ?", "answer": "a star"}\n', "utf-8")
    with pytest.raises(CalibrationError, match="is not plain text"):
        check_data(Recipe(test=str(data), task=("perplexity",)))
    check_data(Recipe(test=str(data), task=("vqa",)))


@pytest.mark.parametrize("directory", [RunDirectory, GridDirectory, FinetuneDirectory])
def test_an_output_below_a_file_is_refused_before_the_work(directory: type[RunDirectory], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    with pytest.raises(StorageError, match="is no folder"):
        directory.examine(tmp_path / "file" / "run" / "first", Recipe().resolved())
    with pytest.raises(StorageError, match="is no folder"):
        check_replaceable(tmp_path / "file" / "packed", overwrite=False)
    assert (tmp_path / "file").read_text("utf-8") == "mine"


def test_the_importance_that_options_name_is_told() -> None:
    asked = Recipe(importance_options={"epsilon": 0.01})
    (line,) = by_options(asked, asked.resolved())
    assert "zeroth-order" in line
    assert "epsilon" in line
    for other in (Recipe(), Recipe(importance="zeroth-order", importance_options={"epsilon": 0.01})):
        assert not list(by_options(other, other.resolved()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exclude": ("model.layer.0",)}, "no layer or tower 'model.layer.0': did you mean 'model.layers.0'"),
        ({"tower_sparsity": {"visio": 0.3}}, "no layer or tower 'visio'"),
        ({"include": ("qformer",)}, "no layer or tower 'qformer'"),
    ],
)
def test_names_of_parts_are_checked_before_the_weights_are_read(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(loading, "load", load)
    folder = str(picos.write_checkpoint("llama", tmp_path / "llama"))
    with pytest.raises(AnatomyError, match=words):
        loading.load_checkpoint(Recipe(model=folder, **fields))
    known = {"exclude": ("model.layers.0", "*.nosuch"), "tower_sparsity": {"model.layers": 0.3, "vision": 0.2}}
    loading.check_parts(Recipe.model_validate({"model": folder, **known}))
