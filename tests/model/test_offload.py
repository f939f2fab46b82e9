"""Weights on the disk: what is read, held, replaced and put back is what the files hold, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertModel

from ecoflap.data.objectives import default_objective, on_device
from ecoflap.errors import CheckpointError, InvalidOption
from ecoflap.importance.measure import measure_importance
from ecoflap.model.checkpoint import Checkpoint, load
from ecoflap.model.device_map import _compute_on, check_device_map
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import Offloaded, home_of, in_memory, is_offloaded, keep_placeholders, read_weight
from ecoflap.model.save import save


def both(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Checkpoint, Checkpoint]:
    """The same checkpoint in memory and on the disk."""
    source = picos.write_checkpoint(name, folder / name, dtype, max_shard_size=20_000)
    return load(source, device="cpu"), load(source, device="cpu", **(options or {"device_map": "disk"}))


def real(model: nn.Module) -> set[str]:
    """Names of the weights in memory, but for those of the model itself, which stay there."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta and "." in name}


@pytest.mark.parametrize("name", ["llama", "t5", "blip2_t5", "clip", "gpt2"])
def test_a_model_on_the_disk_is_the_model(name: str, tmp_path: Path) -> None:
    whole, spread = both(name, tmp_path)
    before = dict(spread.model.named_parameters(remove_duplicate=False))
    assert is_offloaded(spread.model)
    assert not is_offloaded(whole.model)
    assert fingerprint(spread.model) == fingerprint(whole.model)
    assert (spread.dtype, spread.shard_sizes, spread.warnings) == (whole.dtype, whole.shard_sizes, whole.warnings)
    objective, batch = on_device(default_objective(whole.model)), picos.batches(name, padding=True)[0]
    with torch.no_grad():
        assert torch.equal(objective(spread.model, batch), objective(whole.model, batch))
    assert not spread.model.can_generate() or torch.equal(*(_generated(one.model, batch) for one in (spread, whole)))
    after = dict(spread.model.named_parameters(remove_duplicate=False))
    assert all(after[key] is parameter for key, parameter in before.items())  # so that ties and flags last
    for key, parameter in whole.model.named_parameters():
        assert torch.equal(read_weight(spread.model, key), parameter)


def _generated(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name not in ("labels", "decoder_attention_mask")}
    return model.generate(**given, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", ["llama", "t5", "blip2_opt"])
def test_a_model_saved_from_the_disk_is_laid_out_as_from_memory(name: str, tmp_path: Path) -> None:
    whole, spread = both(name, tmp_path)
    a, b = (save(one, tmp_path / kind) for one, kind in ((whole, "a"), (spread, "b")))
    files = sorted(path.name for path in a.iterdir())
    assert sum(file.endswith(".safetensors") for file in files) > 1
    assert files == sorted(path.name for path in b.iterdir())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_a_held_module_is_real_and_its_file_is_never_written(tmp_path: Path) -> None:
    _, spread = both("llama", tmp_path)
    model, name = spread.model, "model.layers.0.mlp.up_proj.weight"
    placeholder, dense = model.get_parameter(name), read_weight(model, name).clone()
    shown = {path: path.read_bytes() for path in (tmp_path / "llama").glob("*.safetensors")}
    with in_memory(model, "model.layers.0"):
        assert real(model) == {key for key, _ in model.named_parameters() if key.startswith("model.layers.0.")}
        with in_memory(model, "model.layers.0.mlp"):  # within: nothing to do
            pass
        model.get_parameter(name).data.zero_()
        batch = picos.batches("llama")[0]
        with torch.no_grad():
            changed = model(**batch).logits
    assert real(model) == set()
    assert model.get_parameter(name) is placeholder
    assert torch.equal(read_weight(model, name), dense)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, changed)
    assert shown == {path: path.read_bytes() for path in shown}


def test_a_moved_weight_is_read_from_its_new_file_by_all_its_names(tmp_path: Path) -> None:
    _, spread = both("t5", tmp_path)
    model, name = spread.model, "shared.weight"
    new = torch.randn(model.get_parameter(name).shape).bfloat16()
    save_file({name: new}, tmp_path / "new.safetensors")
    offloaded = Offloaded(model)
    assert offloaded.among([name, "encoder.final_layer_norm.weight"]) == [name, "encoder.final_layer_norm.weight"]
    offloaded.move(name, new, tmp_path / "new.safetensors")
    tied = [key for key, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    assert len(tied) > 1
    for key in tied:
        assert torch.equal(read_weight(model, key), new)


def test_placeholders_return_when_a_forward_is_broken_off(tmp_path: Path) -> None:
    _, spread = both("clip", tmp_path)

    class Off(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Off

    handle = spread.model.text_model.encoder.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(Off), torch.no_grad():
        spread.model(**picos.batches("clip")[0])
    handle.remove()
    assert real(spread.model) == set()


def test_auto_leaves_what_exceeds_the_memory_on_the_disk(tmp_path: Path) -> None:
    whole, spread = both("llama", tmp_path, device_map="auto", max_memory={"cpu": "40KB"})
    kept = real(spread.model)
    assert 0 < sum(p.nbytes for p in spread.model.parameters() if not p.is_meta) < 40_000
    assert len(kept) < len(list(spread.model.parameters()))
    assert home_of(spread.model) == torch.device("cpu")
    assert fingerprint(spread.model) == fingerprint(whole.model)
    roomy = load(tmp_path / "llama", device="cpu", device_map="auto", max_memory={"cpu": "1GB"})
    assert not is_offloaded(roomy.model)


def test_a_model_on_the_disk_that_computes_elsewhere(tmp_path: Path) -> None:
    """The hooks that ``--device cuda`` puts, with the only device that there is everywhere."""
    whole, _ = both("t5", tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", device_map={"": "disk"}, dtype="auto").eval()
    _compute_on(model, torch.device("cpu"))
    keep_placeholders(model)
    assert home_of(model) == torch.device("cpu")
    assert fingerprint(model) == fingerprint(whole.model)
    batch = picos.batches("t5")[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, whole.model(**batch).loss)


def test_a_users_own_dispatched_model_is_taken_as_it_is(tmp_path: Path) -> None:
    whole, _ = both("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", device_map={"": "disk"}).eval()
    keep_placeholders(model)
    keep_placeholders(model)  # a second time changes nothing
    assert fingerprint(model) == fingerprint(whole.model)
    found = measure_importance(model, picos.batches("llama"), "gradient-norm")
    assert found.scores == measure_importance(whole.model, picos.batches("llama"), "gradient-norm").scores


@pytest.mark.parametrize("name", ["llama", "t5", "blip2_t5"])
@pytest.mark.parametrize("importance", ["gradient-norm", "first-order", "owl", "dlp", "alphapruning"])
def test_stage_1_measures_the_same(name: str, importance: str, tmp_path: Path) -> None:
    whole, spread = both(name, tmp_path)
    batches = picos.batches(name, padding=True)
    a, b = (measure_importance(one.model, batches, importance).scores for one in (whole, spread))
    assert a.keys() == b.keys()
    for layer, score in a.items():
        # Gradients of what several blocks read (an encoder's output, position biases) are added in another order.
        assert b[layer].score == pytest.approx(score.score, rel=1e-5), layer
    assert {parameter.dtype for parameter in spread.model.parameters()} == {torch.bfloat16}
    assert real(spread.model) == set()
    assert fingerprint(spread.model) == fingerprint(whole.model)


def test_a_weight_that_no_file_has_is_at_random_as_in_memory(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "bert")
    spread = load(tmp_path / "bert", device="cpu", device_map="disk")
    assert "no weights for pooler.dense.bias, pooler.dense.weight: left at random" in spread.warnings[0]
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5]])
        found = spread.model(input_ids=ids)
        assert torch.equal(found.last_hidden_state, model.eval()(input_ids=ids).last_hidden_state)
    assert torch.isfinite(found.pooler_output).all()
    assert fingerprint(load(save(spread, tmp_path / "saved"), device="cpu").model) == fingerprint(spread.model)


def test_a_shape_that_does_not_fit_is_told_at_loading(tmp_path: Path) -> None:
    source = picos.write_checkpoint("llama", tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(7,\) in the file"):
        load(source, device="cpu", device_map="disk")


@pytest.mark.parametrize(
    ("device_map", "max_memory", "words"),
    [
        ("cuda:0", None, "device_map 'cuda:0' is not one of disk, auto"),
        (None, {"cpu": "1GB"}, "add --device-map auto"),
        ("auto", {"cpu": "much"}, "max_memory cpu=much: write the amount as 20GiB"),
        ("auto", {"gpu": "1GB"}, "max_memory gpu=1GB: the device must be a GPU's number, or cpu"),
    ],
)
def test_maps_that_nobody_knows(device_map: str | None, max_memory: dict[str, str] | None, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        check_device_map(device_map, max_memory)
