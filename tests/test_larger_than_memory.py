"""A model on the disk is pruned as the same model in memory, to the bit, with one block resident at a time."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from console import TEXT, Command, prose
from forks import forked
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ecoflap import api
from ecoflap.errors import InvalidOption
from ecoflap.model.checkpoint import load
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import is_offloaded
from ecoflap.run.journal import BlockFiles
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

pytestmark = pytest.mark.usefixtures("pageless")


def same_model(a: Path, b: Path) -> None:
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir())
    for file in files:
        if file != "README.md":  # the card tells of the run
            assert (a / file).read_bytes() == (b / file).read_bytes(), file


@pytest.mark.parametrize(
    ("name", "criterion", "importance"),
    [
        ("llama", "magnitude", "uniform"),
        ("llama", "sparsegpt", "gradient-norm"),  # tied embeddings
        ("t5", "wanda", "uniform"),
        ("blip2_opt", "sparsegpt", "owl"),
        ("gpt2", "wanda", "alphapruning"),  # transposed weights
    ],
)
def test_the_python_interface_needs_no_folder(name: str, criterion: str, importance: str, tmp_path: Path) -> None:
    source = picos.write_checkpoint(name, tmp_path / name, torch.bfloat16, max_shard_size=20_000)
    whole, spread = load(source, device="cpu"), load(source, device="cpu", device_map="disk")
    batches = picos.batches(name, padding=True)
    a, b = (api.prune(one.model, batches, 0.5, importance=importance, criterion=criterion) for one in (whole, spread))
    assert a.allocation == b.allocation
    assert is_offloaded(spread.model)
    assert fingerprint(spread.model) == fingerprint(whole.model)
    with torch.no_grad():  # what is run is what was pruned
        for batch in batches:
            assert torch.equal(spread.model(**batch).loss, whole.model(**batch).loss)


def _deep(folder: Path) -> Path:
    """Eight blocks that make up most of the model, in many shards."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    picos.scramble(LlamaForCausalLM(config)).save_pretrained(folder, max_shard_size=40_000)
    picos.processor("llama").save_pretrained(folder)
    return folder


def _parameter_bytes() -> int:
    """Bytes of all parameters with values that this process has made since the last ``gc.freeze``."""
    return sum(o.nbytes for o in gc.get_objects() if isinstance(o, nn.Parameter) and not o.is_meta)


class Watcher:
    """Progress that looks at the memory with every step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def stage(self, *_: object, **__: object) -> Watcher:
        return self

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.seen.append(_parameter_bytes())


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_one_block_is_in_memory_at_a_time(criterion: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = _deep(tmp_path / "deep")
    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    request.addfinalizer(gc.unfreeze)
    assert _parameter_bytes() == 0
    checkpoint = load(source, device="cpu", device_map="disk")
    block = sum(parameter.nbytes for parameter in checkpoint.model.model.layers[0].parameters())
    assert sum(parameter.nbytes for parameter in checkpoint.model.parameters()) > 8 * block
    watcher = Watcher()
    batches = picos.batches("llama")
    api.prune(checkpoint.model, batches, importance="uniform", criterion=criterion, progress=watcher)
    assert len(watcher.seen) >= 8
    # A step sees the block that was just pruned or run, before the first one none; of those before it nothing is held.
    assert set(watcher.seen) - {0} == {block}
    assert watcher.seen.count(0) <= 1


def _recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe(model=str(folder / "deep"), calibration=str(folder / "prose.txt"), samples=6, importance_samples=4,
                  batch_size=2, sequence_length=12, importance="gradient-norm", test=str(folder / "prose.txt"),
                  test_samples=3, **changes)  # fmt: skip


def test_a_whole_run_and_one_that_was_killed(tmp_path: Path) -> None:
    _deep(tmp_path / "deep")
    prose(tmp_path / "prose.txt")
    whole = run_recipe(_recipe(tmp_path), tmp_path / "whole")
    recipe = _recipe(tmp_path, device_map="disk")
    with forked(lambda: _killed_after_four_blocks(recipe, tmp_path / "spread")) as process:
        assert process.wait() == -signal.SIGKILL, process.printed()
    done = sorted(path.stem for path in (tmp_path / "spread" / "journal" / "blocks").glob("*.safetensors"))
    assert done == [f"model.layers.{number}" for number in range(4)]
    spread = run_recipe(recipe, tmp_path / "spread", resume=True)
    same_model(whole / "model", spread / "model")
    for file in ("importance.json", "allocation.json"):
        assert json.loads((whole / file).read_text("utf-8")) == json.loads((spread / file).read_text("utf-8")), file
    a, b = (json.loads((one / "metrics.json").read_text("utf-8")) for one in (whole, spread))
    assert (a["dense"], a["pruned"], a["sparsity"]) == (b["dense"], b["pruned"], b["sparsity"])


def _killed_after_four_blocks(recipe: Recipe, run: Path) -> None:
    save, saved = BlockFiles.save, []

    def save_or_die(self: BlockFiles, block: str, pruned: Any) -> None:
        if len(saved) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(block)
        save(self, block, pruned)

    BlockFiles.save = save_or_die  # type: ignore[method-assign]  # in a process of its own
    run_recipe(recipe, run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--importance", "zeroth-order"),
            ("importance 'zeroth-order'", "gradient-norm (the same quantity without noise)", "importance.json"),
        ),
        (("--importance", "sensitivity"), ("importance 'sensitivity'", "take gradient-norm, first-order, owl")),
        (("--importance", "uniform", "--search"), ("search prunes the whole model at a time", "--no-search")),
        (("--criterion", "global-magnitude"), ("criterion 'global-magnitude'", "such as wanda")),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_it_is_loaded(
    run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("ecoflap.run.loading.load", _never)
    data = prose(tmp_path / "prose.txt")
    model = picos.write_checkpoint("llama", tmp_path / "llama")
    run("prune", model, "--calibration", data, *TEXT, "--device-map", "disk", *options).refused(*words)


def test_a_comparison_needs_the_whole_model(run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ecoflap.run.loading.load", _never)
    data = prose(tmp_path / "prose.txt")
    options = ("--methods", "wanda", "--sparsities", "0.5", "--task", "perplexity", "--test", data)
    model = picos.write_checkpoint("llama", tmp_path / "llama")
    run("compare", model, "--calibration", data, *options, "--device-map", "disk").refused(
        "compare needs all weights in memory"
    )


_never: Callable[..., object] = lambda *_, **__: pytest.fail("it was loaded")  # noqa: E731


def test_python_is_told_the_same(tmp_path: Path) -> None:
    model = load(picos.write_checkpoint("llama", tmp_path / "llama"), device="cpu", device_map="disk").model
    batches = picos.batches("llama")
    with pytest.raises(InvalidOption, match="importance 'zeroth-order' runs the model again"):
        api.prune(model, batches, importance="zeroth-order")
    with pytest.raises(InvalidOption, match="criterion 'iterative-gradient' needs all weights"):
        api.prune(model, batches, criterion="iterative-gradient")
    with pytest.raises(InvalidOption, match="search prunes"):
        api.prune(model, batches, importance="uniform", search=True)
