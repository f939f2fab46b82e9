"""Checkpoint folders packed and unpacked: to the bit, with all that lies beside, and never a crash on damaged ones."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import picos
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ecoflap
from ecoflap.errors import CheckpointError, EcoflapError, InvalidOption, OutputExists
from ecoflap.model.packed import checkpoint, format, shards
from ecoflap.model.packed.checkpoint import pack_checkpoint, unpack_checkpoint
from ecoflap.model.packed.format import pack_weight


def pruned(family, folder, dtype=torch.float32, **options):
    model = getattr(picos, family)().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.weight.data.masked_fill_(torch.rand(module.weight.shape) < 0.7, 0)
    model.save_pretrained(folder, **options)
    return folder


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one, other):
    left, right = tensors(one), tensors(other)
    assert set(left) == set(right)
    return all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llava", "blip2_t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_to_the_bit(family, dtype, tmp_path):
    # As a run writes it: loading keeps some weights of T5 in float32, whatever the file had.
    source = ecoflap.save(ecoflap.load(pruned(family, tmp_path / "source", dtype)), tmp_path / "pruned")
    (source / "README.md").write_text("# A model\n\nThe zeros are stored like other numbers: files and memory are as "
                                      "large as the dense model's, and a runtime must know.\n\nMore.\n")  # fmt: skip
    told = pack_checkpoint(source, tmp_path / "packed")
    assert told.files_after == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import ecoflap" in card
    assert "stored like other numbers" not in card
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    assert same(source, tmp_path / "plain")
    assert "import ecoflap" not in (tmp_path / "plain" / "README.md").read_text()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert ecoflap.load(tmp_path / "plain").dtype is dtype


def test_several_files_and_an_index(tmp_path):
    source = pruned("llama", tmp_path / "pruned", max_shard_size="20KB")
    count = len(list(source.glob("*.safetensors")))
    assert count > 2
    pack_checkpoint(source, tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == count
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    assert same(source, tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(source))
    assert ecoflap.load(tmp_path / "plain").shard_sizes


@pytest.mark.parametrize(
    ("family", "values"), [("llama", "auto"), ("llama", "int4"), ("gpt2", "int8"), ("llava", "auto")]
)
def test_a_model_larger_than_the_memory_is_packed_file_by_file(family, values, tmp_path, monkeypatch):
    source = pruned(family, tmp_path / "pruned", torch.bfloat16, max_shard_size="20KB")
    (source / "README.md").write_text("# A model\n")
    told = pack_checkpoint(source, tmp_path / "whole", values=values)
    monkeypatch.setattr(shards.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(checkpoint, "load", None)  # it never is in memory
    by_files = pack_checkpoint(source, tmp_path / "files", values=values)
    assert set(by_files.model.layers) == set(told.model.layers)
    assert by_files.model.packed_bytes == told.model.packed_bytes
    assert by_files.model.error == pytest.approx(told.model.error)
    assert by_files.files_before == told.files_before
    assert same(tmp_path / "whole", tmp_path / "files")
    assert "import ecoflap" in (tmp_path / "files" / "README.md").read_text()
    one, other = (ecoflap.load(tmp_path / name).model.state_dict() for name in ("whole", "files"))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    unpack_checkpoint(tmp_path / "files", tmp_path / "plain")
    assert set(tensors(tmp_path / "plain")) == set(tensors(source))
    if values == "auto":
        assert same(source, tmp_path / "plain")
    picos.llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(InvalidOption, match="prune it first"):
        pack_checkpoint(tmp_path / "dense", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_int8_comes_back_near_in_the_models_dtype(tmp_path):
    source = pruned("llama", tmp_path / "pruned", torch.bfloat16)
    pack_checkpoint(source, tmp_path / "packed", values="int8")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    before, after = tensors(source), tensors(tmp_path / "plain")
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if weight.dim() == 2:
            factors = tensors(tmp_path / "packed").get(name.replace("weight", "column_scales"), torch.ones(1)).float()
            step = (weight.float() / factors).abs().amax(1, keepdim=True) / 127 * factors
            assert ((after[name].float() - weight.float()).abs() <= step * 0.51 + weight.abs() * 2**-8).all()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_folders_of_version_1_have_no_factors_of_columns(values, tmp_path, monkeypatch):
    source = pruned("llama", tmp_path / "pruned")
    with monkeypatch.context() as patch:
        patch.setattr(format, "column_scales", lambda matrix: torch.ones(matrix.shape[1], dtype=torch.bfloat16))
        pack_checkpoint(source, tmp_path / "packed", values=values)
    old = tmp_path / "packed"
    config = json.loads((old / "config.json").read_text())
    assert config["quantization_config"].pop("column_scales") is True
    assert config["quantization_config"].pop("version") == 3
    config["quantization_config"]["version"] = 1
    expected = ecoflap.load(old).model.dequantize().state_dict()
    stored = {name: tensor for name, tensor in tensors(old).items() if not name.endswith("column_scales")}
    assert len(stored) < len(tensors(old))
    save_file(stored, old / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks its column_scales"):
        ecoflap.load(old)
    (old / "config.json").write_text(json.dumps(config))
    found = ecoflap.load(old).model
    ids = torch.arange(6)[None]
    before = found(ids).logits
    weights = found.dequantize().state_dict()
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    torch.testing.assert_close(before, found(ids).logits, rtol=1e-4, atol=1e-4)
    unpack_checkpoint(old, tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors(tmp_path / "plain")[name], expected[name])


def former(source, folder, where, style):
    """``source`` as compressed-tensors wrote it before 0.15: parts named after the layer or its weight."""
    shutil.copytree(source, folder)
    written = {}
    for name, tensor in tensors(source).items():
        if tensor.dim() == 2 and "proj" in name:
            base = name if style == "weight" else name.removesuffix(".weight")
            written |= {f"{base}.{part}": value for part, value in pack_weight(tensor).tensors().items()}
        else:
            written[name] = tensor
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": "sparse-bitmask", "global_sparsity": 0.7, "sparsity_structure": "unstructured"}
    config[where] = sparsity if where == "sparsity_config" else {
        "quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity,
        "quantization_status": "compressed",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("style", ["layer", "weight"])
@pytest.mark.parametrize("where", ["quantization_config", "sparsity_config", "compression_config"])
def test_former_sparse_bitmask_files(style, where, tmp_path):
    source = pruned("llama", tmp_path / "pruned")
    old = former(source, tmp_path / "old", where, style)
    (old / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    found = ecoflap.load(old)
    expected = ecoflap.load(source)
    assert "sparse-bitmask" in found.warnings[0]
    assert type(found.model) is type(expected.model)
    assert found.model.generation_config.max_new_tokens == 7
    assert found.model.config.name_or_path == str(old)
    weights = found.model.state_dict()
    assert set(weights) == set(expected.model.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in expected.model.state_dict().items())
    found.model.save_pretrained(tmp_path / "saved")  # as a plain model
    assert same(source, tmp_path / "saved")
    assert not {"quantization_config", "sparsity_config", "compression_config"} & set(
        json.loads((tmp_path / "saved" / "config.json").read_text())
    )
    unpack_checkpoint(old, tmp_path / "plain")
    assert same(source, tmp_path / "plain")


def test_former_files_that_cannot_be_loaded(tmp_path):
    old = former(pruned("llama", tmp_path / "pruned"), tmp_path / "old", "quantization_config", "layer")
    with pytest.raises(InvalidOption, match="device_map disk"):
        ecoflap.load(old, device_map="disk")
    pack_checkpoint(old, tmp_path / "packed")  # ours from theirs
    unpack_checkpoint(tmp_path / "packed", tmp_path / "ours")
    assert same(tmp_path / "pruned", tmp_path / "ours")
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised"):
        ecoflap.load(old)
    with pytest.raises(CheckpointError, match="not packed"):
        unpack_checkpoint(old, tmp_path / "plain")
    del config["quantization_config"]["config_groups"]
    (old / "config.json").write_text(json.dumps(config))
    stored = tensors(old)
    name = next(one for one in stored if one.endswith("row_offsets"))
    save_file({**stored, name: stored[name] + 1}, old / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged"):
        ecoflap.load(old)


def test_refusals(tmp_path):
    source = pruned("llama", tmp_path / "pruned")
    with pytest.raises(CheckpointError, match="not packed"):
        unpack_checkpoint(source, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        unpack_checkpoint(tmp_path, tmp_path / "plain")
    pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="packed already"):
        pack_checkpoint(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(OutputExists):
        unpack_checkpoint(tmp_path / "packed", source)
    picos.llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(InvalidOption, match="prune it first"):
        pack_checkpoint(tmp_path / "dense", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed", "pruned"]


def test_no_option_makes_it_lose_its_source_or_what_is_no_model(tmp_path):
    (tmp_path / "run").mkdir()
    source = pruned("llama", tmp_path / "run" / "model")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = tensors(source)
    for output in (source, source / "packed", tmp_path / "run", tmp_path, tmp_path / "run" / ".." / "run" / "model"):
        with pytest.raises(InvalidOption, match="is, holds or lies in"):
            pack_checkpoint(source, output, overwrite=True)
    pack_checkpoint(source, tmp_path / "packed")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EcoflapError):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "loop")
    with pytest.raises(InvalidOption, match="is, holds or lies in"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "packed", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.png").write_text("mine")
    for job in (lambda: pack_checkpoint(source, tmp_path / "other", overwrite=True),
                lambda: unpack_checkpoint(tmp_path / "packed", tmp_path / "other", overwrite=True)):  # fmt: skip
        with pytest.raises(OutputExists, match=r"holiday\.png"):
            job()
    pack_checkpoint(source, tmp_path / "packed", overwrite=True)  # a packed model may be replaced
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain", overwrite=True)
    assert same(source, tmp_path / "plain")
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(source).items())
    assert (tmp_path / "other" / "holiday.png").read_text() == "mine"


@pytest.fixture(scope="module")
def packed_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    pack_checkpoint(pruned("llama", folder / "pruned"), folder / "auto")
    pack_checkpoint(folder / "pruned", folder / "int4", values="int4")
    former(folder / "pruned", folder / "former", "sparsity_config", "weight")
    return folder


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_may_be_wrong(data, packed_folders, tmp_path):
    """Flipped bytes in a weight file or the configuration: one line, or a model; nothing else, and nothing half."""
    broken = tmp_path / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(packed_folders / data.draw(st.sampled_from(["auto", "int4", "former"])), broken)
    file = broken / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        limit = min(len(content), data.draw(st.sampled_from([400, len(content)]))) - 1
        content[data.draw(st.integers(0, limit))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 7]))]))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    line = ""
    try:
        unpack_checkpoint(broken, tmp_path / "out")
    except EcoflapError as error:
        line = str(error)
    assert "\n" not in line
    assert (tmp_path / "out").exists() == (not line)
    if file.name == "model.safetensors":
        with contextlib.suppress(EcoflapError):
            ecoflap.load(broken)


def test_the_commands(run, tmp_path):
    source = pruned("llama", tmp_path / "pruned")
    done = run("pack", str(source), "--output", "packed")
    assert done.code == 0, done.err
    assert "packed" in done.out
    done = run("unpack", "packed", "--output", "plain", "--json")
    assert done.code == 0
    assert json.loads(done.out) == {"model": "plain"}
    assert same(source, tmp_path / "plain")
    done = run("pack", str(source), "--output", "packed")
    assert done.code == 2
    assert done.err.count("\n") == 1
    done = run("pack", str(source), "--output", "other", "--values", "int3")
    assert (done.code, done.err.count("\n")) == (2, 1)
    done = run("inspect", "packed")
    assert done.code == 2
    assert "ecoflap unpack" in done.err
