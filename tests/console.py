"""Runs the command line inside the test's process, and makes small models and data for it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import picos
import pytest
import torch
from PIL import Image

from ecoflap.cli import main

TEXT = ("--samples", "6", "--batch-size", "2", "--sequence-length", "12", "--importance-samples", "4")


_SAID = ("calibration: ", "objective: ", "importance: ")  # how lines begin that say what a run chose


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> str:
        """The one line of a refusal: exit code 2, nothing printed, and each of ``words`` in it.

        A run that had begun has said before what it chose.
        """
        assert self.code == 2, self
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if not line.startswith(_SAID)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("ecoflap: ")
        assert "Traceback" not in lines[0]
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]

    def well(self) -> Outcome:
        assert self.code == 0, self.err
        return self


Command = Callable[..., Outcome]


def command(capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> Command:
    """``run("prune", model, "--sparsity", 0.5)`` as the shell would run it."""

    patch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        patch.setattr(sys, "argv", ["ecoflap", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return Outcome(code, out, err)

    return run


def prose(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """A text over the pico vocabulary."""
    choose = random.Random(seed)
    path.write_text(" ".join(choose.choice(picos.WORDS) for _ in range(words)), "utf-8")
    return path


def llama_and_prose(folder: Path) -> Path:
    """``folder``, with the pico model ``llama`` and a text ``prose.txt`` in it."""
    picos.write_checkpoint("llama", folder / "llama")
    prose(folder / "prose.txt")
    return folder


def questions(folder: Path, count: int = 12) -> Path:
    """A JSONL file with pictures, questions, answers and kinds."""
    choose = random.Random(1)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour = tuple(choose.randrange(256) for _ in range(3))
        Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "question": f"what color is the {choose.choice(['circle', 'star'])} ?",
                "answer": choose.choice(["red", "blue", "green"]),
                "kind": choose.choice(["easy", "hard"]),
            }
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def poisoned_llama(folder: Path, word: str) -> Path:
    """A pico LLaMA checkpoint that gives NaN wherever ``word`` is read."""
    model = picos.llama(tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[picos.VOCABULARY.index(word)] = torch.nan
    model.save_pretrained(folder)
    picos.tokenizer().save_pretrained(folder)
    return folder


def model_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model's safetensors files."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_result(run: Path, other: Path, *, card: bool = True) -> None:
    """Two runs ended alike: importance, allocation and every bit of the model's files, the ``card`` among them."""
    for name in ("importance.json", "allocation.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    names = sorted(path.name for path in (other / "model").iterdir())
    assert names == sorted(path.name for path in (run / "model").iterdir())
    for name in names if card else (name for name in names if name != "README.md"):
        assert (run / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name
