"""Pages and cards that are shared name models and data, not the folders of the machine that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from synthetic import RECIPE, write_comparison, write_run

from ecoflap.report.compare_page import write_compare
from ecoflap.report.page import write_report
from ecoflap.report.places import command_without_places, place_name, text_without_places, without_places

HOME = "/home/somebody/secret project"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/me/models/llava", "llava"),
        ("/home/me/models/llava/", "llava"),
        ("~/data/vqa.jsonl:val", "vqa.jsonl:val"),
        ("/root/.cache/huggingface/hub/models--llava-hf--llava-1.5/snapshots/0a1b", "llava-hf/llava-1.5"),
        ("C:\\Users\\me\\prose.txt", "prose.txt"),
        ("llava-hf/llava-1.5", "llava-hf/llava-1.5"),
        ("data/prose.txt", "data/prose.txt"),
        ("/", "/"),
        ("../../me/models/llava", "llava"),
        ("zeroth-order", "zeroth-order"),
    ],
)
def test_a_place_is_its_last_part(text: str, name: str) -> None:
    assert place_name(text) == name


def test_every_path_of_a_recipe_and_no_prompt() -> None:
    recipe = {
        "model": "/m/llava",
        "prompt": "/describe {question}",
        "class_prompts": ["/a photo of {}", "/x/prompts.txt"],
        "evaluations": [{"name": "vqa", "test": "/d/test.jsonl", "columns": {"image": "jpg"}}],
        "task_options": {"include_path": "/home/me/tasks"},
        "sparsity": 0.5,
    }
    assert without_places(recipe) == {
        "model": "llava",
        "prompt": "/describe {question}",
        "class_prompts": ["/a photo of {}", "prompts.txt"],
        "evaluations": [{"name": "vqa", "test": "test.jsonl", "columns": {"image": "jpg"}}],
        "task_options": {"include_path": "tasks"},
        "sparsity": 0.5,
    }


def test_commands_and_sentences() -> None:
    command = "ecoflap compare '/a b/llava' \\\n  --calibration '/a b/c d.jsonl' \\\n  --task-option include_path=/x/y"
    assert command_without_places(command) == (
        "ecoflap compare llava \\\n  --calibration 'c d.jsonl' \\\n  --task-option include_path=y"
    )
    assert text_without_places("can't read /home/me/x.json: No such file (it/s 1/2, and/or)") == (
        "can't read x.json: No such file (it/s 1/2, and/or)"
    )
    assert command_without_places("an open ' /a/b/quote") == "an open ' quote"


def test_a_page_names_no_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    recipe = {**RECIPE, "model": f"{HOME}/llava", "calibration": f"{HOME}/calibration.jsonl", "test": f"{HOME}/t.jsonl"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(run).read_text("utf-8")
    for name in ("llava", "calibration.jsonl", "t.jsonl"):
        assert name in page
    assert "somebody" not in page


def test_a_comparison_names_no_folder(tmp_path: Path) -> None:
    import json

    folder = write_comparison(tmp_path / "compared")
    path = folder / "compare.json"
    content = json.loads(path.read_text("utf-8"))
    content |= {"model": f"{HOME}/llava", "command": f"ecoflap compare '{HOME}/llava' \\\n  --output again"}
    content["recipe"] = {**content["recipe"], "model": f"{HOME}/llava"}
    content["methods"][0]["importance"] = f"{HOME}/importance.json"
    content["cells"][0] |= {"error": "can't write /home/somebody/x/y.json"}
    content["methods"][0]["title"] = "scores of /home/somebody/importance.json"
    path.write_text(json.dumps(content), "utf-8")
    page = write_compare(folder).read_text("utf-8")
    assert "llava" in page
    assert "somebody" not in page
