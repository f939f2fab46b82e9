"""What is left dense is named, with its reason and its weights: quantised, state-space, routers, positions."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from families.moe import GROUPED, mixture_of_modules
from families.vision import SWIN, Eva
from torch import Tensor, nn

from ecoflap import inspect
from ecoflap.errors import AnatomyError
from ecoflap.model.parts import Anatomy

IDS = torch.randint(6, 64, (2, 8), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}


def weights_by_reason(anatomy: Anatomy) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for entry in anatomy.unprunable:
        found[entry.reason] += entry.numel
    return dict(found)


class Packed(nn.Module):
    """A linear layer as GPTQ keeps it: integers, eight to a word, in a buffer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Eight(nn.Linear):
    """A linear layer of eight-bit numbers."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16, bias=False)
        self.packed = Packed(16, 16)
        self.integer = Eight(16, 16, torch.int8)
        self.eight = Eight(16, 16, torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        return self.eight(self.integer(self.packed(torch.tanh(self.plain(x)))))


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("batch", [None, {"x": torch.ones(2, 16)}])
def test_quantised_layers_count_with_the_weights_that_they_stand_for(batch: Any) -> None:
    anatomy = inspect(Quantised(), batch)
    assert [layer.name for layer in anatomy.layers] == [f"blocks.{i}.plain.weight" for i in range(3)]
    assert weights_by_reason(anatomy) == {
        "quantised (Packed)": 3 * 256, "quantised (int8)": 3 * 256, "quantised (float8_e4m3fn)": 3 * 256,
    }  # fmt: skip
    assert anatomy.total_parameters == 3 * 4 * 256


def test_experts_are_layers_and_their_router_is_dense_until_it_is_included() -> None:
    model = mixture_of_modules()
    anatomy = inspect(model, TEXT)
    experts = [layer for layer in anatomy.layers if layer.expert]
    assert len(experts) == 4 * 3
    assert all(layer.name.startswith(layer.expert + ".w") for layer in experts)
    router = "model.layers.1.mlp.gate.weight"
    assert {e.name: e.reason for e in anatomy.unprunable} == {router: "router of experts, dense by default (--include)"}
    assert anatomy.prunable_parameters + 4 * 32 == inspect(model, TEXT, include=[router]).prunable_parameters


def test_an_expert_that_the_watched_batch_does_not_reach_is_prunable() -> None:
    model = mixture_of_modules()
    one_token = {"input_ids": IDS[:1, :1], "labels": IDS[:1, :1]}
    called: set[str] = set()
    for number, expert in enumerate(model.model.layers[1].mlp.experts):
        expert.register_forward_hook(lambda *_, number=number: called.add(str(number)))
    anatomy = inspect(model, one_token)
    assert len(called) == 2  # of four
    assert len([layer for layer in anatomy.layers if layer.expert]) == 4 * 3


def test_a_mamba_block_is_named_part_by_part() -> None:
    config = transformers.JambaConfig(
        **GROUPED, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model = transformers.JambaForCausalLM(config)
    anatomy = inspect(model, TEXT)
    reasons = weights_by_reason(anatomy)
    mixer = model.model.layers[0].mamba
    assert reasons["state-space parameter of JambaMambaMixer"] == mixer.A_log.numel()
    assert reasons["convolution (Conv1d)"] == mixer.conv1d.weight.numel()
    unseen = [entry for entry in anatomy.unprunable if entry.name.endswith("mamba.dt_proj.weight")]
    assert "it reads the weight itself" in unseen[0].reason  # the mixer multiplies by it without calling the layer
    assert {"in_proj", "x_proj", "out_proj"} <= {layer.name.split(".")[-2] for layer in anatomy.layers}


def test_layers_that_make_position_biases_stay_dense() -> None:
    model = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**SWIN))
    batch = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([1])}
    anatomy = inspect(model, batch)
    assert not any("position" in layer.name for layer in anatomy.layers)
    tables = [e for e in anatomy.unprunable if e.reason == "makes position biases, dense by default (--include)"]
    assert len(tables) == 4 * 2
    assert any("position" in layer.name for layer in inspect(model, batch, include=["*position_bias*"]).layers)


class Unlisted(nn.Module):
    """Two blocks as attributes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


@pytest.mark.parametrize("batch", [None, {"x": torch.ones(2, 4)}])
def test_blocks_outside_of_lists_are_refused_with_the_way_out(batch: Any) -> None:
    with pytest.raises(AnatomyError, match=r"its 64 weights in linear layers lie outside of any nn\.ModuleList"):
        inspect(Unlisted(), batch)


def test_a_weight_that_its_parent_multiplies_by_itself_is_a_layer() -> None:
    model = Eva()
    anatomy = inspect(model, {"x": torch.randn(2, 5, 8)})
    assert {layer.name.split(".")[-2]: layer.uncalled for layer in anatomy.layers} == {"qkv": True, "proj": False}
    assert [entry.name.split(".")[-2] for entry in anatomy.unprunable] == ["spare", "spare"]
