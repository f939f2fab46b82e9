"""Offloaded weights that are read outside of their module's forward: loaded for good, but for matrices of blocks."""

from __future__ import annotations

from pathlib import Path

import picos
import pytest
import torch
from accelerate import cpu_offload
from families.stacked import batches, build
from torch import Tensor, nn
from transformers import JetMoeConfig, JetMoeForCausalLM

import ecoflap
from ecoflap.model.checkpoint import load
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import is_offloaded, keep_placeholders
from ecoflap.model.read_elsewhere import with_weights


def jetmoe() -> nn.Module:
    config = JetMoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_key_value_heads=1, kv_channels=8, intermediate_size=8,
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = picos.scramble(JetMoeForCausalLM(config), 0)
    return model.eval()


@pytest.mark.parametrize("family", ["Llama4Text", "JetMoe"])
def test_a_model_on_the_disk_whose_code_reads_weights_elsewhere_is_pruned_as_in_memory(
    family: str, tmp_path: Path
) -> None:
    model = jetmoe() if family == "JetMoe" else build(family)
    model.save_pretrained(tmp_path)
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


class Block(nn.Module):
    """One of its modules is never called: another method of it uses its weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.held, self.linear = Held(*shape), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.held.added_to(x + self.linear(x))
        return found


class Model(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("shape", [(4,), (4, 4)])
@torch.no_grad()
def test_vectors_of_blocks_are_loaded_and_matrices_are_not(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Model(*shape), torch.randn(2, 4)
    expected = model(x)
    cpu_offload(model)
    keep_placeholders(model)
    with pytest.raises(RuntimeError, match="meta"):
        model(x)
    if len(shape) > 1:
        with pytest.raises(RuntimeError, match="meta"):
            with_weights(model, lambda: model(x))
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    assert torch.equal(with_weights(model, lambda: model(x)), expected)
    assert torch.equal(model(x), expected)
    in_memory = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert in_memory == {f"blocks.{number}.held.weight" for number in range(3)}


def test_other_errors_are_left_alone() -> None:
    def fails() -> None:
        raise RuntimeError("meta is no matter in a model that is in memory")

    with pytest.raises(RuntimeError, match="no matter"):
        with_weights(nn.Linear(2, 2), fails)
