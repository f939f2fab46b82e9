"""Random models in the shapes of well-known ones, whole or as small twins, and random batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        build: the model with random weights, where torch's default device and dtype say.
        batch: one batch of so many samples, on the CPU, by a generator.
    """

    build: Callable[[], PreTrainedModel]
    batch: Callable[[int, torch.Generator], dict[str, Tensor]]


def _answered(ids: Tensor, answer: int) -> Tensor:
    """Labels of the last ``answer`` tokens."""
    labels = ids.clone()
    labels[:, :-answer] = -100
    return labels


def llama(tokens: int, **sizes: Any) -> Shape:
    config = LlamaConfig(**{"tie_word_embeddings": False, **sizes})

    def batch(samples: int, random: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(3, config.vocab_size, (samples, tokens), generator=random)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return Shape(lambda: LlamaForCausalLM(config), batch)


def blip2(question: int, answer: int, vision: dict[str, Any], qformer: dict[str, Any], text: dict[str, Any]) -> Shape:
    language = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, **text}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=language, num_query_tokens=32, image_token_index=3
    )

    def batch(samples: int, random: torch.Generator) -> dict[str, Tensor]:
        words = torch.randint(4, language["vocab_size"], (samples, question), generator=random)
        ids = torch.cat([torch.full((samples, 32), 3), words], dim=1)
        side = config.vision_config.image_size
        return {
            "pixel_values": torch.randn(samples, 3, side, side, generator=random),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(4, language["vocab_size"], (samples, answer), generator=random),
        }

    return Shape(lambda: Blip2ForConditionalGeneration(config), batch)


def qwen_vl(grid: int, question: int, answer: int, vision: dict[str, Any], text: dict[str, Any]) -> Shape:
    """``grid``: patches along each side of the square pictures."""
    marks = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={"rope_parameters": sections, **text}, **marks)

    def batch(samples: int, random: torch.Generator) -> dict[str, Tensor]:
        merged = grid * grid // config.vision_config.spatial_merge_size**2
        words = torch.randint(8, text["vocab_size"], (samples, question + answer), generator=random)
        picture = torch.tensor([4] + [6] * merged + [5]).expand(samples, -1)
        ids = torch.cat([picture, words], dim=1)
        return {
            "pixel_values": torch.randn(samples * grid * grid, 3 * 2 * 14 * 14, generator=random),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * samples),
            "mm_token_type_ids": (ids == 6).long(),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": _answered(ids, answer),
        }

    return Shape(lambda: Qwen2_5_VLForConditionalGeneration(config), batch)


_VIT = {"patch_size": 14, "image_size": 224}
_T5 = {"vocab_size": 32128, "d_kv": 64, "tie_word_embeddings": False}
WHOLE: dict[str, Callable[[], Shape]] = {
    "Llama-3.1-8B": lambda: llama(
        2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=5e5,
    ),
    "Llama-3.2-1B": lambda: llama(
        2048, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=5e5, tie_word_embeddings=True,
    ),
    "BLIP-2 FlanT5-XL": lambda: blip2(
        8, 4,
        {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, **_VIT},
        {"encoder_hidden_size": 1408},
        {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32, **_T5},
    ),
    "Qwen2.5-VL-7B": lambda: qwen_vl(
        32, 64, 64,
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
         "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14},
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064},
    ),
}  # fmt: skip
"""Shapes of the published configurations; the vision tower of BLIP-2 is EVA's ViT-g, its text about 40 tokens."""

SMALL: dict[str, Callable[[], Shape]] = {
    "Llama-3.2-1B, small": lambda: llama(
        128, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=4096,
    ),
    "BLIP-2 FlanT5-XL, small": lambda: blip2(
        8, 4, {"hidden_size": 176, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 4, **_VIT},
        {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 4, "encoder_hidden_size": 176},
        {"d_model": 256, "d_ff": 640, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 4, **_T5,
         "vocab_size": 4016},
    ),
    "Qwen2.5-VL-7B, small": lambda: qwen_vl(
        16, 16, 16,
        {"depth": 8, "hidden_size": 160, "intermediate_size": 428, "num_heads": 4, "out_hidden_size": 256,
         "fullatt_block_indexes": [3, 7], "window_size": 112, "patch_size": 14},
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 4096},
    ),
}  # fmt: skip
"""About an eighth of the width and a quarter of the depth, for processors."""
