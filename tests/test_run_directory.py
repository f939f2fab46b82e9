"""What a run leaves behind: every file, a model that plain transformers loads with the zeros it says, nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
import transformers
import yaml
from console import TEXT, Command, Outcome, model_weights, prose, questions, same_result

from ecoflap.run.recipe import Recipe


def pruned(run: Command, folder: Path, *options: object, name: str = "llama", **how: Any) -> Outcome:
    """Make a checkpoint and its data in ``folder`` and prune it into ``folder/run``."""
    model = folder / "model-before"
    if not model.exists():
        picos.write_checkpoint(name, model, **how)
    data = prose(folder / "prose.txt") if name == "llama" else questions(folder / "data")
    job = ("prune", model, "--calibration", data, *TEXT, "-o", folder / "run")
    return run(*(job if name == "llama" else _without(job, "--sequence-length")), *options)


def _without(job: tuple[object, ...], flag: str) -> tuple[object, ...]:
    at = job.index(flag)
    return job[:at] + job[at + 2 :]


def _numbers(data: Any) -> Iterator[float]:
    if isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _numbers(item)
    elif isinstance(data, int | float):
        yield data


def _everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_directory_of_a_vision_language_model(run: Command, tmp_path: Path) -> None:
    outcome = pruned(
        run, tmp_path, "--criterion", "wanda", "--test", "data/questions.jsonl", "--sparsity", "0.4", name="blip2_t5"
    ).well()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "allocation.json", "importance.json", "log.txt",
        "manifest.json", "metrics.json", "model", "pictures", "predictions.json",
        "recipe.yaml", "report.html",
    ]  # fmt: skip
    assert "run/model" in outcome.out
    assert "run/report.html" in outcome.out

    importance = json.loads((folder / "importance.json").read_text("utf-8"))
    allocation = json.loads((folder / "allocation.json").read_text("utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    for data in (importance, allocation, metrics):
        assert data["format"] == 1
        assert all(math.isfinite(number) for number in _numbers(data))
    assert all(row["n"] == 2 and row["score"] > 0 and row["stderr"] >= 0 for row in importance["layers"])

    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder / "model")
    zeros = {row["name"]: row["zeros"] for row in allocation["layers"]}
    for name, wanted in zeros.items():
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == wanted, name
    total = sum(row["weights"] for row in allocation["layers"])
    assert sum(zeros.values()) == round(0.4 * total) == allocation["zeros"]
    assert all(row["achieved"] == row["zeros"] / row["weights"] for row in allocation["layers"])
    assert {row["modality"] for row in allocation["layers"]} == {"vision", "language"}
    towers = metrics["sparsity"]["towers"]
    assert sum(tower["zeros"] for tower in towers.values()) == sum(zeros.values())
    assert metrics["sparsity"]["model"] == pytest.approx(
        sum(zeros.values()) / sum(p.numel() for p in model.parameters())
    )
    for when in ("dense", "pruned"):
        assert metrics[when]["vqa"]["n"] == 12
        assert set(metrics[when]["vqa"]["by_group"]) == {"easy", "hard"}
    stages = [stage["name"] for stage in metrics["stages"]]
    assert stages == ["loading", "evaluation, dense", "importance", "pruning", "saving", "evaluation, pruned"]
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e6 for stage in metrics["stages"])
    assert metrics["environment"]["torch"] == torch.__version__

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    assert len(recipe["fingerprint"]) == 64
    assert set(recipe["versions"]) == {"ecoflap", "torch", "transformers"}
    assert set(recipe) - {"fingerprint", "versions"} == set(Recipe.model_fields)
    log = (folder / "log.txt").read_text("utf-8")
    for word in ("importance: begins", "pruning: done", "complete", "vision_model"):
        assert word in log
    assert "<html" in (folder / "report.html").read_text("utf-8")

    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    assert type(processor).__name__ == "Blip2Processor"
    assert (folder / "model" / "generation_config.json").exists()
    dense = model_weights(tmp_path / "model-before")
    for name, weight in model_weights(folder / "model").items():
        if name not in zeros:
            assert torch.equal(weight, dense[name]), name  # nothing but the prunable layers has changed
        else:
            kept = weight != 0
            assert torch.equal(weight[kept], dense[name][kept]), name  # Wanda leaves what it keeps as it was


def test_dtype_and_shards_are_kept(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path, "--importance", "first-order", dtype=torch.bfloat16, max_shard_size=20_000).well()
    before, after = tmp_path / "model-before", tmp_path / "run" / "model"
    assert len(list(before.glob("*.safetensors"))) == len(list(after.glob("*.safetensors"))) > 1
    assert {weight.dtype for weight in model_weights(after).values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(after)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight  # the tie is kept
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text("utf-8"))
    for row in allocation["layers"]:
        assert int((model.get_parameter(row["name"]) == 0).sum()) == row["zeros"]


def test_without_evaluation_and_without_data(run: Command, tmp_path: Path) -> None:
    model = picos.write_checkpoint("vit", tmp_path / "vit")
    run("prune", model, "--criterion", "magnitude", "--importance", "uniform", "-o", "run").well()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert metrics["dense"] == metrics["pruned"] == {}
    assert metrics["sparsity"]["prunable"] == 0.5
    assert (tmp_path / "run" / "report.html").exists()


def test_n_of_m(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path, "--pattern", "2:4").well()
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text("utf-8"))
    assert (recipe["sparsity"], recipe["importance"], recipe["pattern"]) == (0.5, "uniform", "2:4")
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text("utf-8"))
    weights = model_weights(tmp_path / "run" / "model")
    for row in allocation["layers"]:
        assert ((weights[row["name"]].reshape(-1, 4) == 0).sum(1) == 2).all()


def test_overwrite_replaces_our_files_alone(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path, "--sparsity", "0.5").well()
    folder = tmp_path / "run"
    (folder / "notes.md").write_text("mine", "utf-8")
    (folder / "plots").mkdir()
    pruned(run, tmp_path, "--sparsity", "0.3").refused("--overwrite", "--resume")
    first = (folder / "allocation.json").read_bytes()
    pruned(run, tmp_path, "--sparsity", "0.3", "--overwrite").well()
    assert (folder / "allocation.json").read_bytes() != first
    assert (folder / "notes.md").read_text("utf-8") == "mine"
    assert (folder / "plots").is_dir()
    assert json.loads((folder / "allocation.json").read_text("utf-8"))["sparsity"] == 0.3


def test_a_run_survives_what_is_refused(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path, "--test", "prose.txt", "--test-samples", 3).well()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "empty.txt").touch()
    for wrong in (
        ["--calibration", "empty.txt"],
        ["--test", "empty.txt"],
        ["--min-sparsity", "0.6"],
        ["--exclude", "nothing"],
        ["--pattern", "2:5"],
        ["--objective", "a:b"],
        ["--importance", "run/importance.json"],  # it would be removed before it is read
        ["--allocation", "run/allocation.json"],
    ):
        pruned(run, tmp_path, "--overwrite", *wrong).refused()
    job = ("--calibration", tmp_path / "prose.txt", *TEXT, "-o", tmp_path / "run", "--overwrite")
    run("prune", tmp_path / "nowhere", *job).refused("nowhere")
    run("prune", tmp_path / "run" / "model", *job).refused("model", "part of", "another --output")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_one_process_at_a_time(run: Command, tmp_path: Path) -> None:
    import fcntl

    pruned(run, tmp_path).well()
    before = _everything(tmp_path / "run")
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        pruned(run, tmp_path, "--overwrite").refused("another process is at work")
    finally:
        os.close(handle)
    assert _everything(tmp_path / "run") == before
    pruned(run, tmp_path, "--overwrite").well()


def test_leftovers_of_a_kill_are_swept_away(run: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".recipe.yaml.abc123.partial").touch()  # killed before the recipe was in place
    pruned(run, tmp_path).well()
    undisturbed = _everything(folder)
    assert not [name for name in undisturbed if name.startswith(".")]
    (folder / "metrics.json").unlink()
    (folder / ".metrics.json.x9_.partial").touch()
    (folder / ".model.partial").mkdir()
    (folder / ".hidden-of-the-user").touch()
    pruned(run, tmp_path, "--resume").well()
    assert _everything(folder) == sorted([*undisturbed, ".hidden-of-the-user"])


def test_the_recipe_of_a_run_repeats_it(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path, "--seed", 3, "--granularity", "layer", "--criterion", "sparsegpt").well()
    run("prune", "--recipe", "run/recipe.yaml", "-o", "again").well()
    same_result(tmp_path / "run", tmp_path / "again")


def test_an_allocation_from_a_run_and_by_hand(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path).well()
    run("allocate", "run/importance.json", "--sparsity", "0.6", "-o", "sixty.json").well()
    data = json.loads((tmp_path / "sixty.json").read_text("utf-8"))
    first, second = data["layers"][:2]
    first["zeros"] = 0
    del first["sparsity"]
    del second["zeros"]
    second["sparsity"] = 0.25
    (tmp_path / "edited.json").write_text(json.dumps(data), "utf-8")
    outcome = pruned(run, tmp_path, "--allocation", "edited.json", "--overwrite").well()
    assert "importance" not in outcome.err  # no stage 1
    assert not (tmp_path / "run" / "importance.json").exists()
    weights = model_weights(tmp_path / "run" / "model")
    assert int((weights[first["name"]] == 0).sum()) == 0
    assert int((weights[second["name"]] == 0).sum()) == round(0.25 * second["weights"])
    for row in data["layers"][2:]:
        assert int((weights[row["name"]] == 0).sum()) == row["zeros"]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text("utf-8"))
    made = sum(int((weights[row["name"]] == 0).sum()) for row in data["layers"])
    assert recipe["sparsity"] == pytest.approx(made / data["total_weights"], abs=1e-6)


def test_importance_of_another_run(run: Command, tmp_path: Path) -> None:
    pruned(run, tmp_path).well()
    os.rename(tmp_path / "run", tmp_path / "first")
    outcome = pruned(run, tmp_path, "--importance", "first/importance.json").well()
    assert "importance:" not in outcome.err
    same_result(tmp_path / "first", tmp_path / "run", card=False)  # whose recipe is another
