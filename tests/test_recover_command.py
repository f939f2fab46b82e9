"""ecoflap recover, and prune --recover: the run directory, resuming, the card, and input that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
import yaml
from console import TEXT, Command, prose
from safetensors.torch import load_file, save_file

from ecoflap.run.journal import BlockFiles

LEAN = TEXT[:-2]  # without --importance-samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense llama, its data, and ``pruned``: the same by magnitude, as somebody else may have done it."""
    folder = tmp_path_factory.mktemp("recover")
    picos.write_checkpoint("llama", folder / "llama")
    picos.write_checkpoint("llama", folder / "pruned")
    picos.write_checkpoint("gpt2", folder / "gpt2")
    weights = load_file(folder / "pruned" / "model.safetensors")
    for name, weight in weights.items():
        if "layers" in name and weight.ndim == 2:
            weight[weight.abs() < weight.abs().median()] = 0
    save_file(weights, folder / "pruned" / "model.safetensors", {"format": "pt"})
    prose(folder / "prose.txt")
    return folder


def options(made: Path) -> list[object]:
    data = made / "prose.txt"
    return ["--calibration", data, *LEAN, "--test", data, "--test-samples", 3, "-o", "run"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_on_the_zeros_of_another_model(run: Command, made: Path, tmp_path: Path) -> None:
    run("recover", made / "pruned", "--dense", made / "llama", *options(made)).well()
    folder = tmp_path / "run"
    before, dense, after = (weights_of(f) for f in (made / "pruned", made / "llama", folder / "model"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if not torch.equal(before[name], dense[name])}
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in after)
    zeros = sum(int((before[name] == 0).sum()) for name in changed)
    share = zeros / sum(before[name].numel() for name in changed)
    assert metrics(folder)["sparsity"]["prunable"] == pytest.approx(share)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["pruned"]) == (str(made / "llama"), str(made / "pruned"))
    assert recipe["sparsity"] == pytest.approx(share, abs=1e-6)
    card = (folder / "model" / "README.md").read_text()
    assert "those of pruned" in card
    assert "fitted to the dense model's outputs" in card
    assert "wanda" not in card.lower()
    page = (folder / "report.html").read_text()
    assert "--recipe recipe.yaml" in page
    assert "2504.02692" in page
    assert "2306.11695" not in page  # Wanda has chosen nothing
    # The run's own recipe repeats it.
    run("prune", "--recipe", folder / "recipe.yaml", "-o", "again", "--quiet").well()
    again = weights_of(tmp_path / "again" / "model")
    assert all(torch.equal(again[name], weight) for name, weight in after.items())


@pytest.mark.usefixtures("pageless")
@pytest.mark.parametrize("which", ["recover", "prune"])
def test_an_interrupted_recovery_goes_on(
    run: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    words = [which, made / "pruned", "--dense", made / "llama"]
    if which == "prune":
        words = [which, made / "llama", "--criterion", "sparsegpt", "--importance", "uniform", "--recover"]
    given = [*words, *options(made), "--quiet"]
    run(*given).well()
    whole = weights_of(tmp_path / "run" / "model")
    calls: list[str] = []
    save = BlockFiles.save

    def saved(files: BlockFiles, block: str, pruned: Any) -> None:
        calls.append(block)
        if len(calls) == (2 if which == "recover" else 4):
            raise RuntimeError("lightning")
        save(files, block, pruned)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "save", saved)
        assert run(*given, "--overwrite").code == 1
    run(*given, "--resume").well()
    resumed = weights_of(tmp_path / "run" / "model")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert calls[-1].startswith("recovered.") == (which == "prune")
    if which == "prune":  # a run directory stands for its model
        run("recover", "run", "--dense", made / "llama", *options(made)[:-2], "-o", "more", "--quiet").well()
        more = weights_of(tmp_path / "more" / "model")
        assert all(torch.equal(more[name] == 0, weight == 0) for name, weight in whole.items())


@pytest.mark.usefixtures("pageless")
def test_what_does_not_fit_is_one_line_and_leaves_nothing(run: Command, made: Path, tmp_path: Path) -> None:
    more = options(made)
    run("recover", *more).refused("give the pruned model", "ecoflap recover MODEL --dense DENSE")
    run("recover", made / "pruned", "--dense", made / "gpt2", *more).refused("was not pruned from", "missing in")
    run("recover", made / "llama", "--dense", made / "llama", *more).refused("no more zeros", "nothing to recover")
    run("recover", made / "llama", "--dense", made / "pruned", *more).refused("no more zeros")
    run("recover", made / "pruned", "--dense", made / "llama", *more[2:]).refused("needs calibration data")
    run("recover", made / "none", "--dense", made / "llama", *more).refused("none")
    fits = ("recover", made / "pruned", "--dense", made / "llama")
    run(*fits, "--recover-options", "steps=0", *more).refused("steps must be")
    run(*fits, "--device-map", "disk", *more).refused("recover needs all weights in memory")
    run("prune", made / "llama", "--recover-options", "steps=3", *more).refused("give recover, too")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": str(made / "llama"), "pruned": str(made / "pruned")}))
    run("prune", "--recipe", "r.yaml", "--sparsity", 0.6, *more).refused("sparsity would choose zeros")
    assert not (tmp_path / "run").exists()
