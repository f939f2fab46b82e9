"""Every command of the docs and the README that needs no hub runs to its end, with few samples of small data.

A pico LLaVA stands for the embedded model, whose own runs are tested elsewhere.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import picos
import pytest
import torch
from console import Command, prose, questions
from safetensors.torch import load_file, save_file

from ecoflap.model.packed.checkpoint import pack_checkpoint
from ecoflap.run.compare import results
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe
from ecoflap.support import embedded

ROOT = Path(__file__).parents[1]
# What names the Hub, real data, a GPU or models of a billion weights: tested elsewhere.
_ELSEWHERE = (
    "$", "...", "push", "Salesforce/", "openai/", "cais/", "lm_eval:", "COCO", "imagenet", "runs/real/", "runs/tower/",
    "runs/tokens/model", "runs/clip/", "--max-memory", "recipes/", "~/",
)  # fmt: skip
_WHOLE_BENCH = re.compile(r"ecoflap bench *(#.*)?")  # measures a random model of a billion weights, too
# Options that make a command small, where it has none of them; an option that it has gets this value.
_DATA = {"--samples": "4", "--importance-samples": "2", "--batch-size": "2", "--test-samples": "2"}
_SMALL = {
    "prune": _DATA, "recover": {"--samples": "4", "--batch-size": "2", "--test-samples": "2"},
    "compare": {**_DATA, "--sparsities": "0.5", "--seeds": "0"},
    "importance": {"--importance-samples": "2", "--samples": "4"},
    "evaluate": {"--limit": "2"}, "analyse": {"--samples": "2"},
    "finetune": {"--epochs": "1", "--train-samples": "6", "--batch-size": "2", "--test-samples": "2"},
    "upop": {"--epochs": "1", "--train-samples": "6", "--batch-size": "2", "--test-samples": "2"},
    "bench": {"--threads": "1", "--rounds": "1", "--batch-sizes": "1", "--prompt-tokens": "2", "--new-tokens": "2"},
}  # fmt: skip
_COPIES = ("runs/wanda", "runs/admm")  # runs of the embedded model, which differ in their criterion alone
_ALWAYS = {"--sequence-length": "12", "--rank": "2"}  # of options that a command has


def _here(line: str) -> bool:
    return not any(word in line for word in _ELSEWHERE) and not _WHOLE_BENCH.fullmatch(line)


def _written() -> Iterator[str]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S):
            lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
            yield from (line for line in lines if line.startswith("ecoflap ") and _here(line))


def _words(line: str) -> tuple[str, ...]:
    """The command without its comment and its output, so that what differs in these alone is run once.

    The same holds for runs that are copies of one run here.
    """
    _, *words = shlex.split(line, comments=True)
    words = ["runs/first" if word in _COPIES else word for word in words]
    if "--output" in words:
        number = words.index("--output")
        del words[number : number + 2]
    return tuple(words)


COMMANDS = list(dict.fromkeys(map(_words, _written())))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the docs name: models, data and runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name, family in (("llama", "llama"), ("blip2", "blip2_t5"), ("llava", "llava"), ("vit", "vit"),
                         ("pruned", "llama"), ("llama-70b", "llama")):  # fmt: skip
        picos.write_checkpoint(family, folder / "path" / "to" / name)
    weights = load_file(folder / "path/to/pruned/model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weight[weight.abs() < weight.abs().median()] = 0
    save_file(weights, folder / "path/to/pruned/model.safetensors", {"format": "pt"})
    for name in ("prose.txt", "held-out.txt", "other.txt"):
        prose(folder / name)
    asked = questions(folder / "data")
    for name in ("vqa.jsonl", "vqa-test.jsonl", "questions.jsonl", "train.jsonl", "held-out.jsonl"):
        shutil.copy(asked, folder / name)
    for picture in asked.parent.glob("*.png"):
        shutil.copy(picture, folder / picture.name)
    for name in ("train.parquet", "questions.parquet"):
        shutil.copy(embedded.calibration_path(), folder / name)
    for name in ("mmlu.jsonl", "dev.jsonl", "piqa.jsonl"):
        row = {"question": "what color is the star ?", "choices": ["red", "blue"], "answer": 0, "subject": "stars"}
        (folder / name).write_text((json.dumps(row) + "\n") * 12)
    few = Recipe(samples=4, importance_samples=4, test_samples=2, batch_size=2, importance="gradient-norm",
                 criterion="wanda")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "model_path", lambda: folder / "path" / "to" / "llava")
        run_recipe(few, folder / "runs" / "first")
        text = few.model_copy(update={"model": str(folder / "path/to/llama"), "calibration": str(folder / "prose.txt")})
        run_recipe(text, folder / "runs" / "llama")
        for name in ("blip2", "second"):
            shutil.copytree(folder / "runs" / "first", folder / "runs" / name)
        pack_checkpoint(folder / "runs" / "first" / "model", folder / "packed")
        shutil.copytree(folder / "packed", folder / "runs" / "first" / "packed")
        for name in ("layers.json", "blip2-60.json"):
            shutil.copy(folder / "runs" / "llama" / "allocation.json", folder / name)
        patch.chdir(folder)
        patch.setattr(results, "PAGES", {name: lambda *_: None for name in ("compare", "compare-plots")})
        yield folder


def test_there_are_many() -> None:
    assert len(COMMANDS) > 50
    assert {words[0] for words in COMMANDS} >= {
        "prune", "recover", "finetune", "pack", "unpack", "bench", "compare", "evaluate", "inspect", "importance",
        "allocate", "analyse", "report",
    }  # fmt: skip


def _small(words: list[str]) -> list[str]:
    if words == ["analyse", "runs/first"]:
        words += ["--what", "importance", "--what", "allocation"]  # all take a minute; they are tested one by one
    if words == ["compare"]:
        words += ["--methods", "owl+wanda,zeroth-order+sparsegpt"]  # of eight, two of which search
    if "--search" in words or "sensitivity" in words:
        words += ["--search-options", "rounds=1", "--criterion-options", "iterations=2"]
    for name, value in {"draws": 2, "epochs": 1, "train_samples": 6}.items():
        words = [re.sub(rf"\b{name}=\d+", f"{name}={value}", word) for word in words]
    while words.count("--methods") > 1:  # of a long list, the first methods
        last = len(words) - 1 - words[::-1].index("--methods")
        del words[last : last + 2]
    for option, value in {**_ALWAYS, **_SMALL.get(words[0], {})}.items():
        if option in words:
            words[words.index(option) + 1] = value
        elif option not in _ALWAYS:
            words += [option, value]
    return words


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.usefixtures("place")
def test_it_runs(
    command: tuple[str, ...], place: Path, run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    if len(command) > 1 and command[0] in ("prune", "recover", "finetune", "upop"):  # half of their time
        monkeypatch.setattr("ecoflap.report.page.write_report", lambda _: None)
        monkeypatch.setattr("ecoflap.report.finetune_page.write_finetune", lambda _: None)
    torch.manual_seed(0)
    words = _small(list(command))
    if words[0] in ("prune", "recover", "finetune", "upop", "compare", "pack", "unpack"):
        words += ["--output", str(tmp_path / "made")]
    elif words[0] in ("importance", "allocate", "evaluate"):
        words += ["--output", str(tmp_path / "made.json")]
    run(*words).well()
