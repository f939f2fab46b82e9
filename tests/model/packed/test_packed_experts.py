"""Stacked experts, packed: what they compute, their bytes, saved, loaded, and back to the bit."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.stacked import LAYOUTS, batches, build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DbrxConfig, DbrxForCausalLM

import ecoflap
from ecoflap.errors import CheckpointError
from ecoflap.model.packed import shards
from ecoflap.model.packed.checkpoint import pack_checkpoint, unpack_checkpoint
from ecoflap.model.packed.format import pack_weight
from ecoflap.model.packed.stack import PackedStack, stacks_of
from ecoflap.model.packed.stacked_matrices import StackedMatrices

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def pruned(layout: str, share: float = 0.7, seed: int = 0, **more: Any) -> nn.Module:
    """A mixture whose matrices are wide enough for packing to pay, with zeros in all of them."""
    inner = "moe_intermediate_size" if layout == "DeepseekV3" else "intermediate_size"
    model = build(layout, hidden_size=64, **{inner: 48}, **more)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() > 1 and "router" not in name and "bias" not in name:
            keys = torch.rand(parameter.shape, generator=generator)
            parameter.data.masked_fill_(keys < share, 0)
    return model


def logits(model: nn.Module, implementation: str = "eager") -> Tensor:
    if implementation != "eager":
        model.config._experts_implementation = implementation
    with torch.no_grad():
        return model(**batches()[0]).logits


@every_layout
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_packed_mixture_computes_what_the_dense_one_does(layout: str, implementation: str) -> None:
    dense, packed = pruned(layout), pruned(layout)
    told = ecoflap.pack(packed)
    experts = sum(p.nbytes for name, p in dense.named_parameters() if p.dim() == 3)
    stacks = stacks_of(packed)
    assert set(stacks) == {name for name, p in dense.named_parameters() if p.dim() == 3} <= set(told.layers)
    assert all(stack.transposed == (layout in ("GptOss", "Llama4Text")) for stack in stacks.values())
    assert sum(stack.packed().nbytes for stack in stacks.values()) < 0.45 * experts  # 0.3 + 1/32, and 8 bytes a row
    torch.testing.assert_close(logits(packed, implementation), logits(dense, implementation), rtol=1e-5, atol=1e-5)


@every_layout
def test_it_is_saved_loaded_and_comes_back_to_the_bit(layout: str, tmp_path: Any) -> None:
    model = pruned(layout)
    model.save_pretrained(tmp_path / "dense")
    ecoflap.pack(model)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed").eval()
    assert again.config.quantization_config.version == 2
    assert set(stacks_of(again)) == set(stacks_of(model))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "plain"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = pruned(layout).state_dict()
    unpacked = again.dequantize().state_dict()
    assert set(plain) == set(unpacked)
    assert all(torch.equal(plain[name], unpacked[name]) for name in plain)
    assert {type(module) for module in again.modules()} == {type(module) for module in build(layout).modules()}


@every_layout
def test_a_mixture_larger_than_the_memory_is_packed_file_by_file(layout: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Also where the files hold the matrices of experts one by one, spread over several files."""
    pruned(layout).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    whole = pack_checkpoint(tmp_path / "dense", tmp_path / "whole")
    monkeypatch.setattr(shards.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    by_files = pack_checkpoint(tmp_path / "dense", tmp_path / "files")
    assert sum("experts" in name for name in whole.model.layers) >= 2
    assert set(by_files.model.layers) == set(whole.model.layers)
    assert by_files.model.packed_bytes == whole.model.packed_bytes
    one, other = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("whole", "files")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    models = [ecoflap.load(tmp_path / name, device="cpu").model for name in ("whole", "files")]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-5, atol=1e-6)


def test_experts_one_above_another_are_packed_too(tmp_path: Any, monkeypatch: Any) -> None:
    """DBRX's: two dimensions, and of one shape whether transposed or not."""
    config = DbrxConfig(
        d_model=64, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=64, pad_token_id=0,
        attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    dense = DbrxForCausalLM(config).eval()
    for name, parameter in dense.named_parameters():
        if ".mlp." in name:
            parameter.data.normal_(std=0.1).masked_fill_(torch.rand(parameter.shape) < 0.7, 0)
    dense.save_pretrained(tmp_path / "dense")
    packed = copy.deepcopy(dense)
    told = ecoflap.pack(packed)
    path = "transformer.blocks.0.ffn.experts.mlp"
    assert set(stacks_of(packed)) == {f"{path}.{leaf}" for leaf in ("w1", "v1", "w2")} == set(told.layers)
    assert told.packed_bytes < 0.45 * told.dense_bytes
    parameter = packed.get_submodule(path).w1
    assert parameter.shape == dense.get_parameter(f"{path}.w1").shape == (4 * 48, 64)
    assert torch.equal(parameter * 1, dense.get_parameter(f"{path}.w1"))
    assert torch.equal(parameter.view(-1), dense.get_parameter(f"{path}.w1").view(-1))
    packed.save_pretrained(tmp_path / "packed")
    again = DbrxForCausalLM.from_pretrained(tmp_path / "packed").eval()
    monkeypatch.setattr(PackedStack, "dense", None)  # no matrix is unpacked: each lies as its product needs it
    for model in (packed, again):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(shards.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    pack_checkpoint(tmp_path / "dense", tmp_path / "files")
    for folder in ("packed", "files"):
        unpack_checkpoint(tmp_path / folder, tmp_path / f"{folder} plain")
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", f"{folder} plain"))
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
    plain = again.dequantize().state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in dense.state_dict().items())
    settings = tmp_path / "packed" / "config.json"
    settings.write_text(settings.read_text().replace(f'"{path}.w1"', '"transformer.wte.weight"'))
    with pytest.raises(CheckpointError, match="experts"):
        DbrxForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["Mixtral", "GptOss"])
def test_rounded_values_are_those_of_each_matrix_by_itself(layout: str, values: str) -> None:
    dense, packed = pruned(layout), pruned(layout)
    assert 0 < ecoflap.pack(packed, values=values).error < 0.1
    for name, stack in stacks_of(packed).items():
        for number, matrix in enumerate(dense.get_parameter(name)):
            alone = PackedStack(pack_weight((matrix.t() if stack.transposed else matrix)[None], values),
                                transposed=stack.transposed, dtype=torch.float32)  # fmt: skip
            torch.testing.assert_close(stack.dense(number), alone.dense(0), rtol=1e-6, atol=1e-9)  # of the scales' sums
    ours = logits(packed)
    torch.testing.assert_close(ours, logits(ecoflap.model.packed.convert.unpack(packed)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_inputs_and_copies_stand_alone() -> None:
    dense, packed = pruned("Mixtral"), pruned("Mixtral")
    ecoflap.pack(packed)
    words = [
        model.get_input_embeddings()(batches()[0]["input_ids"]).detach().requires_grad_() for model in (dense, packed)
    ]
    for model, x in zip((dense, packed), words, strict=True):
        model(inputs_embeds=x).logits.square().sum().backward()
    torch.testing.assert_close(words[1].grad, words[0].grad, rtol=1e-4, atol=1e-4)
    expected = logits(packed)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits(twin), expected)
        next(iter(stacks_of(twin).values())).compressed.data.zero_()
        assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_whatever_is_computed_with_a_packed_parameter_is_as_with_the_dense_one(transposed: bool) -> None:
    rows = torch.randn(3, 8, 70).masked_fill_(torch.rand(3, 8, 70) < 0.6, 0)
    stack = PackedStack(pack_weight(rows), transposed=transposed)
    dense = rows.transpose(1, 2).contiguous() if transposed else rows
    seen = StackedMatrices(stack)
    assert (seen.shape, seen.dtype, len(seen), seen.dim()) == (dense.shape, dense.dtype, 3, 3)
    wide = torch.randn(3, 5, dense.shape[2])
    tall = torch.randn(3, 5, dense.shape[1])
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)

    def told(stacked: Tensor) -> list[Tensor]:
        one, some = stacked[torch.tensor(1)], stacked[torch.tensor([2, 0, 2])]
        return [
            torch.bmm(some, wide.mT), torch.bmm(tall, some), torch.bmm(wide, some.mT), torch.bmm(some.mT, tall.mT),
            torch.bmm(stacked, wide[:, :1].mT), some[1] + 0, some[-1].mT, some.mT[torch.tensor([1, 1])], some * 2,
            stacked[0], stacked[-1] + 0, one.T @ torch.ones(len(one)), tall[0] @ one, wide[0] @ one.t(),
            wide[1] @ one.mT, stacked.permute(2, 0, 1), stacked.view(-1),
            nn.functional.linear(wide[0], one), nn.functional.linear(wide[0], stacked[2], torch.ones(len(one))),
            torch.bmm(tall, stacked), torch.bmm(wide, stacked.transpose(-2, -1)), wide @ stacked.mT,
            torch.einsum("etk,ekn->etn", tall, stacked), stacked[torch.tensor([2, 0, 2])], stacked.sum(), stacked * 2,
            stacked[:, 1:3], torch.stack([matrix + 0 for matrix in stacked]),
            one.chunk(2)[1], stacked.abs().amax(), stacked.to(torch.float64), stacked.select(0, 1) - 1,
            torch.addmm(torch.zeros(1), tall[0], one), stacked.clone(), stacked.float().mT.contiguous(),
        ]  # fmt: skip

    for ours, theirs in zip(told(seen), told(dense), strict=True):
        plain = ours.dense() if isinstance(ours, StackedMatrices) else ours
        torch.testing.assert_close(plain, theirs, rtol=1e-5, atol=1e-5)
    grouped = torch._grouped_mm(tall[0], seen, offs=ends)
    for number, (low, high) in enumerate([(0, 2), (2, 2), (2, 4)]):
        torch.testing.assert_close(grouped[low:high], tall[0][low:high] @ dense[number], rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError, match="3 experts"):
        seen[3]


def test_parts_on_the_disk_and_files_that_do_not_agree(tmp_path: Any) -> None:
    model = pruned("Mixtral", num_hidden_layers=2)
    ecoflap.pack(model)
    model.save_pretrained(tmp_path / "packed")
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = type(model).from_pretrained(tmp_path / "packed", device_map=places, offload_folder=tmp_path / "off")
    assert stacks_of(spread)["model.layers.1.mlp.experts.down_proj"].compressed.is_meta
    torch.testing.assert_close(logits(spread), logits(model), rtol=1e-5, atol=1e-6)
    config = tmp_path / "packed" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 96'))
    with pytest.raises((CheckpointError, RuntimeError), match=r"down_proj|gate_up_proj"):
        type(model).from_pretrained(tmp_path / "packed")
