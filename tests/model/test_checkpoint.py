"""Loading: every family comes back as its own class, dtype, processor and weights, from a folder and from GGUF."""

import json
from pathlib import Path

import picos
import pytest
import torch
import transformers

from ecoflap.errors import CheckpointError, InvalidOption, MissingDependency
from ecoflap.model import checkpoint as module
from ecoflap.model.checkpoint import load, model_dtype


@pytest.mark.parametrize("name", picos.FAMILIES)
def test_a_folder_gives_the_class_weights_and_processor_that_it_was_saved_from(name: str, tmp_path: Path) -> None:
    built = picos.FAMILIES[name].build(seed=3)
    loaded = load(picos.write_checkpoint(name, tmp_path / "m", seed=3), device="cpu")

    assert type(loaded.model) is type(built)
    assert not loaded.model.training
    assert type(loaded.processor).__name__ == {
        "blip2_t5": "Blip2Processor",
        "blip2_opt": "Blip2Processor",
        "llava": "LlavaProcessor",
        "clip": "CLIPProcessor",
        "vit": "ViTImageProcessorPil",
    }.get(name, type(loaded.processor).__name__)
    if name != "vit":
        tokens = getattr(loaded.processor, "tokenizer", loaded.processor)("is the circle red ?").input_ids
        expected = [picos.VOCABULARY.index(word) for word in ("is", "the", "circle", "red", "?")]
        assert [token for token in tokens if token > picos.MASK] == expected
    assert loaded.warnings == ()
    assert loaded.source == str(tmp_path / "m")
    for batch in picos.batches(name, n=2, padding=True):
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(**batch).loss, built(**batch).loss, rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_auto_is_the_checkpoints_own_and_t5_keeps_wo_in_fp32_under_fp16(
    stored: torch.dtype, tmp_path: Path
) -> None:
    folder = picos.write_checkpoint("t5", tmp_path / "m", stored)
    loaded = load(folder, device="cpu")
    assert loaded.dtype == model_dtype(loaded.model) == stored
    kinds = {name: p.dtype for name, p in loaded.model.named_parameters()}
    for name, kind in kinds.items():
        expected = torch.float32 if stored == torch.float16 and name.endswith(".wo.weight") else stored
        assert kind == expected, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_given(dtype: str, tmp_path: Path) -> None:
    folder = picos.write_checkpoint("llama", tmp_path / "m", torch.bfloat16)
    loaded = load(folder, dtype=dtype, device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.dtype == getattr(torch, dtype)


def test_the_dtype_is_that_of_most_weights_not_of_the_first_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(8, 8).half())
    assert model_dtype(model) == torch.float16


def test_ties_hold_after_loading(tmp_path: Path) -> None:
    model = load(picos.write_checkpoint("llama", tmp_path / "m"), device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_without_a_named_class_the_auto_classes_are_asked(tmp_path: Path) -> None:
    for name in ("blip2_t5", "llava", "clip", "t5", "llama", "vit", "bert"):
        folder = picos.write_checkpoint(name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(load(folder, device="cpu").model) is type(picos.FAMILIES[name].build())


def test_a_model_without_processor_files_has_none(tmp_path: Path) -> None:
    picos.llama().save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m", device="cpu").processor is None


def test_a_broken_processor_gives_one_warning_line(tmp_path: Path) -> None:
    folder = picos.write_checkpoint("llama", tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("{")
    loaded = load(folder, device="cpu")
    assert loaded.processor is None
    (line,) = loaded.warnings
    assert str(folder) in line
    assert "\n" not in line


@pytest.mark.parametrize("style", ["BlipImageProcessor", "BlipImageProcessorFast"])
def test_published_image_processor_files_load_without_torchvision(style: str, tmp_path: Path) -> None:
    """BLIP-2's published folders name the torchvision or the slow class in preprocessor_config.json."""
    folder = picos.write_checkpoint("blip2_t5", tmp_path / "m")
    nested = json.loads((folder / "processor_config.json").read_text())
    images = nested.pop("image_processor") | {"image_processor_type": style, "processor_class": "Blip2Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(nested))
    processor = load(folder, device="cpu").processor
    assert isinstance(processor, transformers.Blip2Processor)
    from PIL import Image

    batch = processor(images=Image.new("RGB", (40, 30), "red"), text="what color ?", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, picos.IMAGE, picos.IMAGE)
    assert int((batch["input_ids"] == picos.IMAGE_TOKEN).sum()) == picos.QUERIES


def test_weights_that_the_class_does_not_use_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = picos.write_checkpoint("t5", tmp_path / "m")
    _edit(folder, lambda weights: weights | {"extra.weight": torch.zeros(2, 2)})
    loaded = load(folder, device="cpu")
    (line,) = loaded.warnings
    assert "extra.weight" in line
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ecoflap")] == [line]
    assert capfd.readouterr().out == ""


def test_a_missing_pooler_is_a_warning_since_no_loss_of_ours_sees_it(tmp_path: Path) -> None:
    config = picos.bert().config
    model = picos.scramble(transformers.BertModel(config))
    model.save_pretrained(tmp_path / "m")
    _edit(tmp_path / "m", lambda weights: {k: v for k, v in weights.items() if "pooler" not in k})
    (line,) = load(tmp_path / "m", device="cpu").warnings
    assert "pooler.dense.weight" in line


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta:x"])
def test_an_unusable_device_or_dtype_is_an_invalid_option(device: str, tmp_path: Path) -> None:
    folder = picos.write_checkpoint("llama", tmp_path / "m")
    with pytest.raises(InvalidOption, match=device):
        load(folder, device=device)
    with pytest.raises(InvalidOption, match="float64"):
        load(folder, dtype="float64")


# --- GGUF ----------------------------------------------------------------------------------------------------------


def _write_gguf(path: Path) -> transformers.LlamaForCausalLM:
    """A pico LLaMA in llama.cpp's layout: q and k rows interleaved per head, names of its own."""
    gguf = pytest.importorskip("gguf")
    model = picos.llama(seed=5)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("pico")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(picos.VOCABULARY)
    writer.add_token_types([3] * picos.FIRST_WORD + [1] * (len(picos.VOCABULARY) - picos.FIRST_WORD))
    writer.add_token_scores([0.0] * len(picos.VOCABULARY))
    writer.add_token_merges([])
    writer.add_bos_token_id(picos.BOS)
    writer.add_eos_token_id(picos.EOS)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for block in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{block}.{ours}.weight"].numpy()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:
                rows, columns = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            writer.add_tensor(f"blk.{block}.{theirs}.weight", weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_gives_plain_weights_from_the_file_its_folder_or_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built = _write_gguf(tmp_path / "pico.gguf")
    (batch,) = picos.batches("llama")[:1]
    with torch.no_grad():
        expected = built(**batch).loss
    for source, option in ((tmp_path / "pico.gguf", None), (tmp_path, None), (tmp_path, "pico.gguf")):
        loaded = load(source, gguf_file=option, device="cpu")
        assert type(loaded.model) is transformers.LlamaForCausalLM
        assert loaded.dtype == torch.float32
        assert loaded.shard_sizes == ()
        assert loaded.model.hf_quantizer is None
        assert not hasattr(loaded.model.config, "quantization_config")
        assert type(loaded.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert loaded.processor.convert_ids_to_tokens([picos.FIRST_WORD]) == ["what"]
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(**batch).loss, expected, rtol=1e-5, atol=1e-5)
    assert capfd.readouterr().err == ""


def test_gguf_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_gguf(tmp_path / "pico.gguf")
    gguf = pytest.importorskip("gguf")
    reader, read = gguf.GGUFReader, list[object]()

    class Counted(reader):  # type: ignore[misc, valid-type]
        def __init__(self, path: object, *rest: object) -> None:
            read.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    for _ in range(2):
        read.clear()
        load(tmp_path / "pico.gguf", device="cpu")
        assert len(read) == 1
        assert gguf.GGUFReader is Counted
    (tmp_path / "pico.gguf").write_bytes((tmp_path / "pico.gguf").read_bytes()[:400])
    with pytest.raises(CheckpointError):
        load(tmp_path / "pico.gguf", device="cpu")
    assert gguf.GGUFReader is Counted


def test_gguf_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'ecoflap\[gguf\]'"):
        load(tmp_path / "m.gguf")


def _edit(folder: Path, change: object) -> None:
    from safetensors.torch import load_file, save_file

    weights = change(load_file(folder / "model.safetensors"))  # type: ignore[operator]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
