"""Every command of the docs and the README that needs no hub: read, checked as it is typed, and the quick ones run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import picos
import pytest
from console import Command, prose, questions

from ecoflap.run import commands
from ecoflap.run.compare import grid
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
# What names the Hub, real data or a machine of its own, and commands that write what others read: tested elsewhere.
_ELSEWHERE = (
    "$", "...", "push", "Salesforce/", "openai/", "cais/", "lm_eval:", "COCO", "imagenet", "runs/real/", "runs/tower/",
    "runs/tokens/", "runs/clip/", "llama-70b", "mmlu", "piqa", "recipes/", "bench", "finetune", "recover", "int8",
    "pack",
)  # fmt: skip


def _here(line: str) -> bool:
    return not any(word in line for word in _ELSEWHERE)


def _written() -> Iterator[str]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S):
            lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
            yield from (line for line in lines if line.startswith("ecoflap ") and _here(line))


COMMANDS = list(dict.fromkeys(_written()))
AT_ONCE = ("allocate", "report")


class _Reached(Exception):
    """All checks before the model is loaded are passed."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the docs name: models, data and a run."""
    folder = tmp_path_factory.mktemp("docs")
    for name, family in (("llama", "llama"), ("blip2", "blip2_t5"), ("llava", "llava"), ("vit", "vit"),
                         ("pruned", "llama")):  # fmt: skip
        picos.write_checkpoint(family, folder / "path" / "to" / name)
    for name in ("prose.txt", "held-out.txt", "other.txt"):
        prose(folder / name)
    asked = questions(folder / "data")
    for name in ("vqa.jsonl", "vqa-test.jsonl", "questions.jsonl", "train.jsonl", "held-out.jsonl"):
        shutil.copy(asked, folder / name)
    for picture in asked.parent.iterdir():
        if picture.is_dir():
            shutil.copytree(picture, folder / picture.name, dirs_exist_ok=True)
        elif not (folder / picture.name).exists():
            shutil.copy(picture, folder / picture.name)
    few = Recipe(samples=4, importance_samples=4, test_samples=2, batch_size=2, importance="gradient-norm",
                 criterion="wanda")  # fmt: skip
    run_recipe(few, folder / "runs" / "first")
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "blip2")
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "llama")
    for name in ("layers.json", "blip2-60.json"):
        shutil.copy(folder / "runs" / "first" / "allocation.json", folder / name)
    return folder


def test_there_are_many() -> None:
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("line", COMMANDS)
def test_it_is_accepted(line: str, place: Path, run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the moment at which the model would be loaded; what takes a moment runs to its end."""

    def reached(*_: Any, **__: Any) -> None:
        raise _Reached

    monkeypatch.setenv("ECOFLAP_TRACEBACK", "1")  # so that _Reached comes through
    for name in ("evaluate_model", "measure_to", "inspect_model"):
        monkeypatch.setattr(commands, name, reached)
    monkeypatch.setattr("ecoflap.run.pipeline.run_recipe", reached)
    monkeypatch.setattr(grid, "run_grid", reached)
    monkeypatch.setattr("ecoflap.report.analysis.run.analyse", reached)
    monkeypatch.chdir(place)
    _, *words = shlex.split(line, comments=True)
    if "--output" in words:
        number = words.index("--output") + 1
        words[number] = str(tmp_path / "made")
    elif words[0] == "allocate":
        words += ["--output", str(tmp_path / "made.json")]
    if words[0] in AT_ONCE:
        run(*words).well()
        return
    with pytest.raises(_Reached):
        run(*words)
