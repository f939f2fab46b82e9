"""Checkpoints that cannot be loaded: one line each that names the place and what to do, at once and without network."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import picos
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from ecoflap.errors import CheckpointError
from ecoflap.model.checkpoint import load
from ecoflap.model.files import hub_files


def _refused(source: str | Path, *words: str, **options: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(source, device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return picos.write_checkpoint("t5", tmp_path / "model")


def test_a_mistyped_path_is_answered_with_its_neighbour_and_without_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(folder.parent)
    _refused(folder.parent / "modle", "no model folder", "did you mean", str(folder))
    _refused("./modle", "did you mean 'model'")
    _refused(f"{folder}/nested/deeper", "does not exist either")
    _refused("~/surely/not/here", "give a folder, a .gguf file or a hub id")
    _refused("smol.gguf", "no model folder 'smol.gguf'")
    _refused("model/deeper", "no model folder 'model/deeper'")  # like a hub id, but 'model' is a folder here


def test_a_folder_that_is_no_model(folder: Path) -> None:
    _refused(folder.parent, "no config.json", "did you mean", str(folder))
    empty = folder.parent / "empty"
    empty.mkdir()
    _refused(empty, "no config.json", "save_pretrained")
    (empty / "adapter_config.json").write_text("{}")
    _refused(empty, "adapter", "merge")


def test_files_in_place_of_a_folder(folder: Path) -> None:
    _refused(folder / "model.safetensors", "is a file", "folder")
    (folder / "old.bin").write_bytes(b"x")
    _refused(folder / "old.bin", "pickled", "safetensors")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refused(folder, "pickled weights", "pytorch_model.bin", "T5ForConditionalGeneration", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    _refused(folder, "no weights", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 1000, -8])
def test_broken_safetensors_are_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    _refused(folder, str(path), "broken or incomplete")


def test_shards_missing_broken_or_elsewhere(tmp_path: Path) -> None:
    folder = picos.write_checkpoint("t5", tmp_path / "m", max_shard_size=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    _refused(folder, shards[1].name, "broken or incomplete")
    shards[1].unlink()
    _refused(folder, shards[1].name, "missing")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other/x.safetensors"}}))
    _refused(folder, "outside its folder")
    index.write_text(json.dumps({}))
    _refused(folder, "weight_map")
    index.write_text("{")
    _refused(folder, str(index), "cannot be read")


def test_bad_configurations(folder: Path) -> None:
    _config(folder, architectures=["NoSuchModel"], model_type="nosuch")
    _refused(folder, "NoSuchModel", "transformers")
    _config(folder, auto_map={"AutoModel": "code.Model"})
    _refused(folder, "code", "trust_remote_code")
    _config(folder, auto_map=None, quantization_config={"quant_method": "gptq"})
    _refused(folder, "quantised (gptq)")
    (folder / "config.json").write_text("{")
    _refused(folder, "config.json", "cannot be read")
    (folder / "config.json").write_text("[]")
    _refused(folder, "no JSON object")


def test_a_configuration_that_the_class_refuses(folder: Path) -> None:
    _config(folder, d_model="wide")
    _refused(folder, "cannot be loaded as T5ForConditionalGeneration")


def test_missing_weights_are_an_error_as_they_would_be_random(folder: Path) -> None:
    _edit(folder, lambda weights: {k: v for k, v in weights.items() if "decoder.block.1" not in k})
    _refused(folder, "lacks", "decoder.block.1", "random")


def test_weights_of_another_shape_are_named_with_both_shapes(folder: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    _edit(folder, lambda weights: weights | {name: torch.zeros(3, 5)})
    _refused(folder, name, "(3, 5)", "(16, 16)")


def test_gguf_files_missing_ambiguous_or_broken(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"no header at all")
    _refused(tmp_path / "a.gguf", "not a GGUF file")
    _refused(tmp_path, "not a GGUF file")
    _refused(tmp_path, "no GGUF file 'z.gguf'", "a.gguf", gguf_file="z.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")  # ends in the header
    _refused(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    _refused(tmp_path, "2 GGUF files", "a.gguf, b.gguf")


# --- the hub -------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited for the hub"))
    _refused("someone/some-model", "hub cannot be reached", "someone/some-model")
    (tmp_path / "some-modle").mkdir()
    _refused("some-model", "hub cannot be reached", "did you mean 'some-modle'")


def _hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    def model_info(self: object, name: str, timeout: float) -> object:
        assert timeout <= 15
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.parametrize(("kind", "words"), [(RepositoryNotFoundError, "knows no model"), (GatedRepoError, "consent")])
def test_a_hub_that_refuses(kind: type, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    _hub(monkeypatch, kind("no", response=response))
    _refused("someone/some-model", words, "hf auth login")


def test_a_hub_id_is_downloaded_and_loaded_as_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.name for path in folder.iterdir()] + ["pytorch_model.bin", "code.py", "onnx/model.onnx"]
    _hub(monkeypatch, SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in names]))
    asked = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, files=sorted(allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load("someone/some-model", device="cpu")
    assert loaded.source == "someone/some-model"
    assert type(loaded.model).__name__ == "T5ForConditionalGeneration"
    assert asked == {
        "name": "someone/some-model",
        "files": [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
    }


def test_without_the_hub_its_cache_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the hub's own layout, holding what an earlier download of ours fetched."""
    cache = folder.parent / "hub"
    repository = cache / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots/c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    _hub(monkeypatch, OSError("no network"))
    assert type(load("someone/some-model", device="cpu").model).__name__ == "T5ForConditionalGeneration"
    _refused("someone/other-model", "hub cannot be reached")


def test_one_set_of_weights_is_downloaded_and_code_only_when_trusted() -> None:
    common = ["config.json", "merges.txt", "README.md"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    both = [*common, *shards, index, "model.safetensors", "a.py", "pytorch_model.bin", "x.gguf", "y.gguf", "sub/z.json"]
    assert hub_files(both, None, False) == [*common, "model.safetensors"]
    assert hub_files(both, None, True) == [*common, "a.py", "model.safetensors"]
    assert hub_files(both, "y.gguf", False) == [*common, index, "y.gguf"]
    assert hub_files([*common, *shards, index, "model.fp16.safetensors"], None, False) == [*common, index, *shards]
    assert hub_files([*common, "pytorch_model.bin"], None, False) == common
    assert hub_files(["x.gguf"], None, False) == ["x.gguf"]
