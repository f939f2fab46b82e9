"""Configurations of all families: the defaults of their classes, completed where those are not enough, and shrunk."""

from __future__ import annotations

import copy
from typing import Any

import transformers as hf
from transformers.models.auto import modeling_auto as auto

# Text mixtures of experts that are the text part of no model of pictures.
MIXTURES = (
    "afmoe", "bailing_hybrid", "dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "jamba", "jetmoe", "kimi_linear", "lfm2_moe", "longcat_flash", "mimo_v2_flash",
    "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "solar_open", "zaya",
)  # fmt: skip
# Text models whose blocks share weights, or hand on more than their outputs, or are no plain transformers.
OTHERS = (
    "albert", "bamba", "falcon_mamba", "gemma3n_text", "gemma4_text", "lfm2", "mamba2", "olmo_hybrid",
    "recurrent_gemma", "rwkv", "xlstm", "zamba2",
)  # fmt: skip
MASKED = {"albert": "AlbertForMaskedLM"}

NOT_BUILT = {
    "fast_vlm": "its image tower is timm's, which needs torchvision",
    "gemma3n": "its image tower is timm's, which needs torchvision; `gemma3n_text` is its text part",
    "perception_lm": "its image tower is timm's, which needs torchvision",
    "xlstm": "its configuration's defaults need the package xlstm",
}

# Types that take what the sweep does not make, and are pruned by tests with inputs of their own.
BY_TESTS = {
    "blip": "images and text (test_matrix.py)",
    "blip-2": "images and text (test_matrix.py)",
    "instructblip": "images and text (test_matrix.py)",
    "kosmos-2": "images and text (test_matrix.py)",
    "pi0": "images, text and actions (test_carried.py)",
    "zamba2": "text (test_later.py)",
}


def architectures() -> dict[str, str]:
    """Model type to the class that is tried, for all types of the image-text-to-text list and the text ones above."""
    found = dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    text = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found.update({kind: MASKED.get(kind) or text[kind] for kind in (*MIXTURES, *OTHERS)})
    return found


# What a class's own defaults lack: fields by path, for a model of full size.
_LACKING: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", *["sparse"] * 31], "text_config.num_experts_per_tok": 6,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 128, "text_config.top_k_experts": 8, "text_config.moe_intermediate_size": 704,
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "gemma4": {"vision_config": hf.Gemma4VisionConfig()},
    "gemma4_unified": {"vision_config": hf.Gemma4UnifiedVisionConfig()},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config.head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},
    "vision-encoder-decoder": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "qwen4_exp": {
        "text_config.indexer_budget": 64, "text_config.indexer_compress_ratio": 4, "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 64,
    },
}  # fmt: skip


def complete(config: Any, fields: dict[str, Any]) -> None:
    """Set fields by their path: ``{"text_config.head_dim": 8}``."""
    for path, value in fields.items():
        owner = config
        *owners, name = path.split(".")
        for one in owners:
            owner = getattr(owner, one)
        vars(owner)[name] = copy.deepcopy(value)  # which is changed for a pico model


def full(kind: str) -> Any:
    """The configuration of a model of this type at the size of its class's defaults."""
    config = hf.CONFIG_MAPPING[kind]()
    complete(config, _LACKING.get(kind, {}))
    return config
