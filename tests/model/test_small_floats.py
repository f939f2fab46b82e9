"""Checkpoints in eight- and four-bit floats: unpacked to bfloat16, pruned and saved so, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
import transformers
from families.text import GROUPED
from safetensors.torch import load_file, save_file
from torch import Tensor

import ecoflap
from ecoflap.errors import InvalidOption
from ecoflap.model.checkpoint import load
from ecoflap.model.save import save

BLOCK = 16
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _stored(folder: Path, model: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], quantised: Any) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}), "utf-8")


def fp8(folder: Path) -> dict[str, Tensor]:
    """A LLaMA whose blocks hold float8 with a scale for each 16 x 16 square; the weights that these stand for."""
    model = picos.scramble(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), 0)
    expected: dict[str, Tensor] = {}

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, weight in weights.items():
            if "_proj.weight" not in name:
                found[name] = expected[name] = weight
                continue
            squares = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # rows, 16, columns, 16
            scales = squares.abs().amax(dim=(1, 3)) / 448
            small = (squares / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            found[name] = small.view(weight.shape)
            found[f"{name}_scale_inv"] = scales
            expected[name] = (small.float() * scales[:, None, :, None]).reshape(weight.shape).bfloat16()
        return found

    _stored(folder, model, change, {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    })  # fmt: skip
    return expected


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """A GPT-OSS whose experts are four-bit floats, two a byte, with an exponent for each 32."""
    config = transformers.GptOssConfig(
        **{**GROUPED, "intermediate_size": 32}, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = picos.scramble(transformers.GptOssForCausalLM(config), 0)
    random = torch.Generator().manual_seed(0)
    expected: dict[str, Tensor] = {}

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, weight in weights.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                found[name] = expected[name] = weight
                continue
            experts, inputs, outputs = weight.shape  # GPT-OSS stores (inputs, outputs), its four bits the other way
            codes = torch.randint(0, 16, (experts, outputs, inputs), generator=random)
            exponents = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=random)
            found[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, 16))
            found[f"{name}_scales"] = exponents.to(torch.uint8)
            values = FP4[codes & 7] * (1 - 2 * (codes >> 3)) * 2.0 ** (exponents - 127).repeat_interleave(32, dim=-1)
            expected[name] = values.transpose(1, 2).bfloat16()
        return found

    _stored(folder, model, change, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return expected


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_small_floats_become_bfloat16(make: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    expected = make(source)
    found = load(source, device="cpu")
    assert found.dtype == torch.bfloat16
    assert any(f"stored in {make.__name__}: unpacked to bfloat16" in line for line in found.warnings)
    state = found.model.state_dict()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    batches = picos.FAMILIES["llama"].batches(2, 1)
    result = ecoflap.prune(found.model, batches, sparsity=0.5, importance="uniform")
    assert abs(result.sparsity - 0.5) < 0.02
    save(found, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    again = type(found.model).from_pretrained(tmp_path / "pruned", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, found.model.state_dict()[name]), name
    with pytest.raises(InvalidOption, match="unpacked in memory: leave out device_map"):
        load(source, device="cpu", device_map="disk")
