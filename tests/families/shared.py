"""Models whose weights are used in several places, or whose blocks hand on more than their outputs, at pico size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import picos
import torch
import transformers as hf
from torch import nn

Made = tuple[nn.Module, list[dict[str, Any]], Callable[..., Any]]
_IDS = {"pad_token_id": picos.PAD, "bos_token_id": picos.BOS, "eos_token_id": picos.EOS}


def _texts(padding: bool, count: int = 2) -> list[dict[str, Any]]:
    return picos.FAMILIES["llama"].batches(2 * count, 2, padding=padding)


def _loss(model: nn.Module, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


def zamba2(padding: bool = False) -> Made:
    """One transformer block in two layers, each of which has an adapter of its own in it."""
    config = hf.Zamba2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, mamba_d_state=8, mamba_headdim=16, mamba_ngroups=1, n_mamba_heads=4, chunk_size=8,
        use_mem_eff_path=False, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1,
        adapter_rank=4, **_IDS,
    )  # fmt: skip
    return picos.scramble(hf.Zamba2ForCausalLM(config), 0), _texts(padding), _loss


def albert(padding: bool = False) -> Made:
    """Two groups of weights for six layers: the first is called three times, then the second."""
    config = hf.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_hidden_groups=2, num_attention_heads=4, max_position_embeddings=64, **_IDS,
    )  # fmt: skip
    return picos.scramble(hf.AlbertForMaskedLM(config), 0), _texts(padding), _loss


class Turns(nn.Module):
    """Blocks a, b, a, b: the second call of a reads what b gave."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        x = self.embedding(input_ids)
        for layer in (*self.layers, *self.layers):
            x = x + layer(x)
        return x.square().mean()


def turns(padding: bool = False) -> Made:
    return picos.scramble(Turns(), 0), _texts(padding), lambda model, batch: model(**batch)


def diffusion_gemma(padding: bool = False) -> Made:
    """The encoder's weights are the decoder's, which reads the encoder's keys and values from a cache."""
    config = hf.DiffusionGemmaConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 16, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"], **_IDS,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8,
        },
        canvas_length=4, image_token_id=60, boi_token_id=61, eoi_token_id=62,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
            "decoder_input_ids": torch.randint(5, 60, (len(batch["input_ids"]), 4), generator=generator),
        }
        for batch in _texts(padding)
    ]  # fmt: skip
    model = picos.scramble(hf.DiffusionGemmaForBlockDiffusion(config), 0)
    return model, batches, lambda model, batch: model(**batch).logits.square().mean()


def pi0(padding: bool = False) -> Made:
    """A model of pictures and text fills a cache, which the tower of the robot's actions reads and adds to."""
    text = {
        "model_type": "gemma", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    whole = {
        "model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 32,
        "image_token_id": 63,
    }  # fmt: skip
    config = hf.PI0Config(
        vlm_config=whole, dit_config={**text, "hidden_size": 16, "intermediate_size": 24}, chunk_size=4,
        max_state_dim=4, max_action_dim=4,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        ids = torch.cat([torch.full((2, 4), 63), torch.randint(5, 60, (2, 6), generator=random)], dim=1)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0 if padding else 1
        return {
            "state": torch.randn(2, 4, generator=random), "noise": torch.randn(2, 4, 4, generator=random),
            "timestep": torch.rand(2, generator=random), "actions": torch.randn(2, 4, 4, generator=random),
            "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 1, 3, 16, 16, generator=random),
            "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        }  # fmt: skip

    model = picos.scramble(hf.PI0ForConditionalGeneration(config), 0)
    return model, [batch(), batch()], lambda model, one: model(**one).loss.mean()
