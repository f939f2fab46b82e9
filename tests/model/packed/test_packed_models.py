"""Whole models: packed in place, saved, loaded by plain transformers, run, moved, unpacked to the bit."""

import json
import subprocess
import sys

import picos
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ecoflap
from ecoflap.errors import CheckpointError, InvalidOption
from ecoflap.model.packed.linear import PackedLinear
from ecoflap.model.packed.quantizer import PackedConfig


def zeroed(model, share=0.7):
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            keys = torch.rand_like(module.weight, dtype=torch.float32)
            module.weight.data.masked_fill_(keys < share, 0)
    return model.eval()


def llama(**more):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=100, tie_word_embeddings=True, pad_token_id=0, **more,
    )  # fmt: skip
    return zeroed(LlamaForCausalLM(config))


def reloaded(model, folder, **options):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **options)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


IDS = torch.randint(1, 100, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A packed Llama in bfloat16."""
    model = reloaded(llama().bfloat16(), tmp_path / "dense")
    ecoflap.pack(model)
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "llava", "blip2_t5", "clip", "bert", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_run_packed_and_come_back_to_the_bit(family, dtype, tmp_path):
    built = zeroed(getattr(picos, family)())
    dense = reloaded(built.to(dtype), tmp_path / "dense")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    batch = picos.batches(family, n=2)[0]
    batch = {
        key: value.to(dtype) if getattr(value, "is_floating_point", bool)() else value for key, value in batch.items()
    }
    with torch.no_grad():
        expected = dense(**batch).loss
    told = ecoflap.pack(dense)
    assert told.packed_bytes < told.dense_bytes
    model = reloaded(dense, tmp_path / "packed")
    assert set(layers(model)) == set(told.layers)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).loss, expected, rtol=3e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-3
        )
    after = model.dequantize().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    plain = reloaded(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_files_are_smaller_and_hold_the_tied_weight_once(folder):
    dense, packed = (
        sum(file.stat().st_size for file in (folder.parent / name).glob("*.safetensors"))
        for name in ("dense", "packed")
    )
    assert packed < 0.65 * dense  # the embedding stays
    names = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.up_proj.compressed" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names


def test_several_files(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="30KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_it_stays_packed_and_generates(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = layers(model)
    assert len(packed) == 14
    assert all(not parameter.requires_grad for layer in packed.values() for parameter in layer.parameters())
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    assert model.get_memory_footprint() < 0.65 * dense.get_memory_footprint()
    dense = dense.float()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.to(torch.float32).generate(IDS, **options), dense.generate(IDS, **options))


def test_other_heads_find_the_same_layers(folder):
    base = AutoModel.from_pretrained(folder)
    assert len(layers(base)) == 14
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_dtypes_as_it_is_loaded_and_later(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {layer.compressed.dtype for layer in layers(model).values()} == {torch.float32}
    assert model.to(torch.float16)(IDS).logits.dtype is torch.float16
    assert {layer.weight.dtype for layer in layers(model).values()} == {torch.float16}


@pytest.mark.parametrize(("values", "group_size"), [("int8", 0), ("int8", 64), ("int4", 64)])
def test_rounded_values_keep_float32_scales(values, group_size, tmp_path):
    model = llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, 3] *= 64
    model = reloaded(model, tmp_path / "dense")
    expected = model(IDS).logits
    weights = [module.weight.detach().clone() for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    told = ecoflap.pack(model, values=values, group_size=group_size)
    rounded = [layer.dense_weight() for layer in layers(model).values()]
    off = sum((a - b).double().square().sum() for a, b in zip(rounded, weights, strict=True))
    assert told.error == pytest.approx(float(off / sum(w.double().square().sum() for w in weights)) ** 0.5, rel=1e-4)
    packed = reloaded(model, tmp_path / "packed")
    assert torch.equal(packed(IDS).logits, model(IDS).logits)
    assert told.error < {"int8": 0.01, "int4": 0.15}[values]
    off = {"int8": 0.05, "int4": 0.4}[values]
    assert (packed(IDS).logits - expected).abs().max() < off * expected.abs().max()
    half = packed.to(torch.bfloat16)
    assert {layer.scales.dtype for layer in layers(half).values()} == {torch.float32}
    factors = torch.stack([layer.column_scales[0, 3] for layer in layers(half).values()])
    assert (factors >= 4).all()
    assert torch.equal(factors, factors.log2().round().exp2())
    assert {layer.weight.dtype for layer in layers(half).values()} == {torch.bfloat16}
    assert half(IDS).logits.dtype is torch.bfloat16


def test_as_a_quantisation_of_a_dense_checkpoint(tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PackedConfig())
    assert len(layers(model)) == 14


def test_trainer_evaluates(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(tmp_path / "out", use_cpu=True, report_to=[], disable_tqdm=True)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-2)


@pytest.mark.slow
def test_compiled_and_exported(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=1)
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_parts_on_the_disk(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.compressed.is_meta
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)


def test_layers_whose_weight_others_read_stay_dense():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4)
            self.one, self.same = nn.Linear(64, 64), nn.Linear(64, 64)
            self.same.weight = self.one.weight
            self.alone = nn.Linear(64, 64)

    model = zeroed(Model(), 0.9)
    assert ecoflap.pack(model).layers == ("alone",)
    x = torch.randn(2, 64)
    layer = model.alone
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert "PackedLinear(in_features=64" in repr(model)


def test_nothing_to_pack_is_told():
    with pytest.raises(InvalidOption, match="prune it first"):
        ecoflap.pack(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(InvalidOption, match="int3"):
        ecoflap.pack(zeroed(nn.Sequential(nn.Linear(64, 64))), values="int3")


def test_a_state_dict_of_another_packing_is_loaded_checked():
    one, other = (zeroed(nn.Sequential(nn.Linear(64, 64)), share) for share in (0.5, 0.8))
    x = torch.randn(3, 64)
    ecoflap.pack(one), ecoflap.pack(other)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    state = other.state_dict()
    state["0.bitmask"] = state["0.bitmask"] ^ 1
    with pytest.raises(CheckpointError, match="damaged"):
        one.load_state_dict(state)


DAMAGE = {
    "bits": lambda t: t.update({UP + "bitmask": t[UP + "bitmask"] ^ 1}),
    "fewer values": lambda t: t.update({UP + "compressed": t[UP + "compressed"][:-3]}),
    "offsets": lambda t: t.update({UP + "row_offsets": t[UP + "row_offsets"] + 10**9}),
    "shape": lambda t: t.update({UP + "shape": torch.tensor([1 << 40, 1 << 40])}),
    "other columns": lambda t: t.update({UP + "shape": torch.tensor([160, 72])}),
    "rows": lambda t: t.update({UP + "bitmask": t[UP + "bitmask"][:3]}),
    "no values": lambda t: t.pop(UP + "compressed"),
    "no mask": lambda t: t.pop(UP + "bitmask"),
    "dtype": lambda t: t.update({UP + "bitmask": t[UP + "bitmask"].int()}),
}
UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_in_one_line(name, folder):
    tensors = load_file(folder / "model.safetensors")
    DAMAGE[name](tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"version": 99}, {"format": "lz4"}, {"values": "int3"}, {"group_size": 5}, {"layers": {"model.layers.0": -1}},
    {"layers": [1]}, {"format": "os.system"}, {"layers": {"model.embed_tokens": 3}},
    {"layers": {"model.layers.0.mlp.up_proj": 1 << 40}},
])  # fmt: skip
def test_configurations_that_we_do_not_write(change, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


# What transformers reads besides itself is read once; then each order has a process of its own, without transformers.
_ORDERS = """
import os, sys, torch, torch._dynamo, torch.distributed.tensor
for order in ("import ecoflap, transformers", "import transformers, ecoflap",
              "import transformers.quantizers, ecoflap"):
    assert not {"ecoflap", "transformers"} & set(sys.modules)
    if os.fork() == 0:
        exec(order)
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(order, str(model).count("PackedLinear"), sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_one_import_is_enough_in_any_order(folder):
    told = subprocess.run([sys.executable, "-c", _ORDERS, str(folder)], check=True, capture_output=True, text=True)
    counts = [line.rpartition(": ")[2] for line in told.stdout.splitlines()]
    assert counts == ["14"] * 3, told


def test_the_import_loads_no_torch():
    code = "import sys, ecoflap; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
