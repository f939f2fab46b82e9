"""Offloaded weights that are read outside of their module's forward: loaded for good, but for matrices of blocks."""

from __future__ import annotations

from pathlib import Path

import picos
import pytest
import torch
from accelerate import cpu_offload
from families.stacked import batches, build
from torch import Tensor, nn
from transformers import DbrxConfig, DbrxForCausalLM, JetMoeConfig, JetMoeForCausalLM

import ecoflap
from ecoflap.errors import InvalidOption
from ecoflap.model.anatomy import discover
from ecoflap.model.checkpoint import load
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import is_offloaded, keep_placeholders
from ecoflap.model.read_elsewhere import with_weights


def jetmoe() -> nn.Module:
    return JetMoeForCausalLM(JetMoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_key_value_heads=1, kv_channels=8, intermediate_size=8,
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
    ))  # fmt: skip


def dbrx() -> nn.Module:
    experts = {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16}
    return DbrxForCausalLM(DbrxConfig(
        vocab_size=64, d_model=16, n_heads=2, n_layers=2, max_seq_len=64, pad_token_id=0, ffn_config=experts,
        attn_config={"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
    ))  # fmt: skip


FAMILIES = {"JetMoe": jetmoe, "Dbrx": dbrx, "Llama4Text": lambda: build("Llama4Text")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_disk_whose_code_reads_weights_elsewhere_is_pruned_as_in_memory(
    family: str, tmp_path: Path
) -> None:
    picos.scramble(FAMILIES[family](), 0).save_pretrained(tmp_path)
    picos.tokenizer().save_pretrained(tmp_path)
    whole, spread = (load(tmp_path, device="cpu", device_map=where).model for where in (None, "disk"))
    for one in (whole, spread):
        ecoflap.prune(one, batches(1), sparsity=0.5, importance="uniform", criterion="wanda")
    assert is_offloaded(spread)
    assert fingerprint(whole) == fingerprint(spread)


class Held(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def added_to(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


class Inner(nn.Module):
    """One of its modules is never called: its weight is used by another method, or by this one."""

    def __init__(self, where: str, *shape: int) -> None:
        super().__init__()
        self.where, self.linear = where, nn.Linear(4, 4)
        self.held = nn.Linear(*shape, bias=False) if where == "product" else Held(*shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(x)
        if self.where == "product":  # which torch multiplies without a word, whatever lies in memory
            return nn.functional.linear(x, self.held.weight.type(torch.float32))
        return self.held.added_to(x) if self.where == "method" else x + self.held.weight.sum()


class Block(nn.Module):
    def __init__(self, where: str, *shape: int) -> None:
        super().__init__()
        self.inner, self.after = Inner(where, *shape), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.after(self.inner(x))
        return found


class Model(nn.Module):
    def __init__(self, where: str, *shape: int) -> None:
        super().__init__()
        self.where, self.blocks = where, nn.ModuleList(Block(where, *shape) for _ in range(3))
        self.before = Inner(where, *shape)  # as embeddings are, outside of blocks
        self.queries = nn.Embedding(2, 4)  # whose weight is read as it is

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x) + self.queries.weight.unsqueeze(0)[:, 0]
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[0].after.weight.sum() if self.where == "outside" else x


@pytest.mark.parametrize(
    ("where", "shape", "stays"), [("method", (4,), True), ("parent", (4, 4), False), ("product", (4, 4), False)]
)
@torch.no_grad()
def test_vectors_stay_in_memory_and_matrices_of_blocks_as_long_as_their_reader_runs(
    where: str, shape: tuple[int, ...], stays: bool
) -> None:
    torch.manual_seed(0)
    model, x = Model(where, *shape), torch.randn(2, 4)
    expected, layers = model(x), discover(model, {"x": x}).layers
    assert ("blocks.0.inner.held.weight" in {layer.name for layer in layers}) == (where == "product")
    cpu_offload(model)
    keep_placeholders(model)
    assert torch.equal(with_weights(model, lambda: model(x)), expected)
    assert torch.equal(model(x), expected)
    in_memory = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert discover(model, {"x": x}).layers == layers
    vectors = {"before.held.weight", *(f"blocks.{number}.inner.held.weight" for number in range(3))}
    assert in_memory == {"queries.weight"} | (vectors if stays else set())


@torch.no_grad()
def test_what_is_read_of_a_block_from_outside_is_refused() -> None:
    model = Model("outside", 4)
    cpu_offload(model)
    keep_placeholders(model)
    with pytest.raises(InvalidOption, match="accelerate does not load"):
        with_weights(model, lambda: model(torch.randn(2, 4)))


def test_other_errors_are_left_alone() -> None:
    def fails() -> None:
        raise RuntimeError("meta is no matter in a model that is in memory")

    with pytest.raises(RuntimeError, match="no matter"):
        with_weights(nn.Linear(2, 2), fails)
