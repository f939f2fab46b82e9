"""Saving: plain transformers loads what we write with the same outputs; nothing half-written ever stays."""

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import picos
import pytest
import torch
import transformers

from ecoflap.errors import CheckpointError, OutputExists, StorageError
from ecoflap.model.checkpoint import Checkpoint, load, model_dtype
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.save import replacing, save

FP16 = ("t5", "blip2_t5", "blip2_opt")
CASES = [
    (name, dtype)
    for name in picos.FAMILIES
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if name in FP16 else ()))
]


def _losses(model: Any, name: str) -> list[float]:
    kind, found = model_dtype(model), []
    for batch in picos.batches(name, n=4, padding=True):
        inputs = {k: v.to(kind) if k == "pixel_values" else v for k, v in batch.items()}
        with torch.no_grad():
            found.append(model(**inputs).loss.item())
    return found


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_plain_transformers_loads_a_saved_folder_with_the_same_outputs(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = picos.write_checkpoint(name, tmp_path / "source", dtype)
    loaded = load(source, device="cpu")
    save(loaded, tmp_path / "saved")

    plain = type(loaded.model).from_pretrained(tmp_path / "saved")
    assert {n: p.dtype for n, p in plain.named_parameters()} == {n: p.dtype for n, p in loaded.model.named_parameters()}
    assert _losses(plain, name) == _losses(loaded.model, name)
    assert fingerprint(plain) == fingerprint(loaded.model)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(p.name for p in source.iterdir())
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(processor) is type(loaded.processor)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_changed_weights_are_what_is_saved_and_ties_stay(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("llama", tmp_path / "source"), device="cpu")
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    save(loaded, tmp_path / "saved")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight, weight)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_generation_settings_of_the_source_are_kept(tmp_path: Path) -> None:
    source = picos.write_checkpoint("llama", tmp_path / "source")
    settings = json.loads((source / "generation_config.json").read_text()) | {"max_new_tokens": 7, "num_beams": 3}
    (source / "generation_config.json").write_text(json.dumps(settings))
    save(load(source, device="cpu"), tmp_path / "saved")
    kept = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert kept["max_new_tokens"] == 7
    assert kept["num_beams"] == 3


def test_published_generation_settings_that_contradict_themselves_do_not_stop_a_save(tmp_path: Path) -> None:
    """Several published LLaMA folders set a temperature with sampling off."""
    source = picos.write_checkpoint("llama", tmp_path / "source")
    settings = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.9, "do_sample": False}
    (source / "generation_config.json").write_text(json.dumps(settings))
    save(load(source, device="cpu"), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.9


@pytest.mark.parametrize("limit", [20_000, 40_000, 60_000])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_as_many_weight_files_as_the_source_had_of_like_size(limit: int, dtype: str, tmp_path: Path) -> None:
    source = picos.write_checkpoint("llava", tmp_path / "source", max_shard_size=limit)
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = load(source, dtype=dtype, device="cpu")
    assert loaded.shard_sizes == tuple(path.stat().st_size for path in shards)
    save(loaded, tmp_path / "saved")
    saved = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [path.name for path in saved] == [path.name for path in shards]
    share = 0.5 if dtype == "bfloat16" else 1.0
    assert max(p.stat().st_size for p in saved) < 1.3 * share * max(p.stat().st_size for p in shards)
    assert fingerprint(type(loaded.model).from_pretrained(tmp_path / "saved")) == fingerprint(loaded.model)


def test_a_model_from_gguf_settings_and_one_built_in_memory_are_saved_too(tmp_path: Path) -> None:
    model = picos.t5()
    save(Checkpoint(model, None, "in memory", torch.float32), tmp_path / "saved")
    assert fingerprint(load(tmp_path / "saved", device="cpu").model) == fingerprint(model)


# --- all or nothing ------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone_unless_overwritten(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    target = tmp_path / "target"
    target.mkdir()
    save(loaded, target)  # an empty folder is no obstacle
    (target / "README.md").write_text("mine")
    with pytest.raises(OutputExists, match="target"):
        save(loaded, target)
    assert (target / "README.md").read_text() == "mine"
    save(loaded, target, overwrite=True)
    assert not (target / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "dense.safetensors", "model-old.safetensors", "photos/holiday.png", ".git/config", "run.py"]
)
def test_what_is_no_part_of_a_model_is_never_replaced(tmp_path: Path, name: str) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    target = tmp_path / "target"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    with pytest.raises(OutputExists, match=re.escape(name)):
        save(loaded, target, overwrite=True)
    assert [path for path in target.rglob("*") if path.is_file()] == [target / name]
    with pytest.raises(OutputExists, match="is a file"):
        save(loaded, target / name, overwrite=True)
    assert (target / name).read_text() == "mine"


def test_every_file_that_is_written_may_be_replaced(tmp_path: Path) -> None:
    for name in ("llava", "blip2_opt", "clip"):
        loaded = load(picos.write_checkpoint(name, tmp_path / "source" / name), device="cpu")
        for _ in range(2):
            save(loaded, tmp_path / name, overwrite=True)
    index = {"weight_map": {"a": "pytorch_model-1.safetensors"}}
    (tmp_path / "clip" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "clip" / "pytorch_model-1.safetensors").write_bytes(b"x")  # named by the index
    save(loaded, tmp_path / "clip", overwrite=True)


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    (tmp_path / ".saved.partial").mkdir()
    (tmp_path / ".saved.partial/model-00001-of-00009.safetensors").write_bytes(b"half")
    save(loaded, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "source"]
    assert not list((tmp_path / "saved").glob("model-*"))


@contextmanager
def _files_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes fails with an OSError, as on a full disk."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 5_000, 30_000])  # fails in config.json, early and late in the weights
def test_a_full_disk_is_one_line_and_leaves_what_was_there(size: int, tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    save(loaded, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with _files_at_most(size), pytest.raises(StorageError) as caught:
        save(loaded, tmp_path / "saved", overwrite=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "saved") in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "source"]


def test_a_disk_that_is_full_at_the_tokenizer_is_the_same_error(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    large = picos.tokenizer()
    large.add_tokens([f"a-rather-long-word-{i}" for i in range(2000)])
    weights = (tmp_path / "source/model.safetensors").stat().st_size
    with _files_at_most(weights + 4096), pytest.raises(StorageError, match="saved"):
        save(replace(loaded, processor=large), tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="saved"):
        save(loaded, tmp_path / "file/saved")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir()
        (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(StorageError, match="ermission"):
            save(loaded, tmp_path / "locked/saved")


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "saved"

    def second(overwrite: bool) -> None:
        with pytest.raises(OutputExists, match="another process is writing"), replacing(place, overwrite=overwrite):
            pytest.fail("both write")

    with replacing(place) as partial:
        (partial / "config.json").write_text("first")
        second(overwrite=False)
        second(overwrite=True)
    assert (place / "config.json").read_text() == "first"
    with replacing(place, overwrite=True) as partial:
        (partial / "config.json").write_text("second")
        second(overwrite=True)
    assert (place / "config.json").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_was_made_while_another_process_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, flock = tmp_path / "saved", fcntl.flock

    def late(handle: int, how: int) -> None:
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text("theirs")
        flock(handle, how)

    monkeypatch.setattr("fcntl.flock", late)
    with pytest.raises(OutputExists, match="already holds"), replacing(place):
        pytest.fail("theirs is replaced")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert (place / "config.json").read_text() == "theirs"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(replace(loaded, processor=SimpleNamespace(save_pretrained=interrupted)), tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_model_that_transformers_refuses_to_save_is_an_error_of_ours(tmp_path: Path) -> None:
    loaded = load(picos.write_checkpoint("t5", tmp_path / "source"), device="cpu")

    def refuse(folder: Path) -> None:
        raise ValueError("not this one\nand much more")

    with pytest.raises(CheckpointError, match=r"T5ForConditionalGeneration: not this one$"):
        save(replace(loaded, processor=SimpleNamespace(save_pretrained=refuse)), tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
