"""The same configurations at pico size: tens of features, two blocks a tower, so that a model runs in milliseconds."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from family_sweep.configs import complete, full

VOCABULARY = 200
_SIZES: dict[int, tuple[str, ...]] = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "width", "text_embed_dim", "vision_output_dim", "out_hidden_size",
         "projection_dim", "input_dim", "model_dim", "projector_hidden_size", "output_dim", "embedding_size",
         "attention_hidden_size", "lru_width", "embed_dim", "text_hidden_size"),
    48: ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "mlp_dim",
         "intermediate_size_mlp", "ffn_hidden_size", "block_ff_dim", "shared_expert_intermediate_size"),
    2: ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers", "num_global_layers", "num_key_value_heads", "num_experts_per_tok",
        "moe_k", "top_k_experts", "moe_topk", "moe_top_k", "moe_num_experts_per_tok", "num_hash_layers", "layers"),
    4: ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
        "qk_rope_head_dim", "sliding_window", "laurel_rank", "hidden_size_per_layer_input", "mamba_n_heads"),
    8: ("head_dim", "d_kv", "kv_channels", "qk_nope_head_dim", "v_head_dim", "attention_head_dim", "swa_head_dim",
        "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_head_dim"),
    16: ("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "vision_embed_dim", "expert_ffn_hidden_size"),
    64: ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"),
    VOCABULARY: ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"),
}  # fmt: skip
_SIZE = {name: size for size, names in _SIZES.items() for name in names}
# Fields whose value is one for each block: the first block's and the last one's are kept.
_BY_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")

# What the rules above get wrong.
_HAND: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "dbrx": {"attn_config.clip_qkv": 8.0},
    "dots3_note": {"vision_config.adapter_in_dim": 32, "vision_config.adapter_out_dim": 32},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [1]},
    "chameleon": {
        "vq_config.base_channels": 32, "vq_config.num_embeddings": 10, "vq_config.embed_dim": 16,
        "vocabulary_map": {"<image>": 4, **{f"IMGIMG{'ABCDEFGHIJ'[one]}Z": 100 + one for one in range(10)}},
    },
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [32, 32], "vision_config.sam_config.global_attn_indexes": [1],
    },
    "emu3": {
        "text_config.vocab_size": VOCABULARY, "vq_config.base_channels": 32, "vq_config.hidden_size": 128,
        "vq_config.codebook_size": 10,
        "vocabulary_map": {
            "<image>": 4, "<|extra_200|>": 5, **{f"<|visual token {one:06}|>": 100 + one for one in range(10)},
        },
    },
    "bailing_hybrid": {"num_experts": 16, "n_group": 2, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granite4_vision": {
        "qformer_config.hidden_size": 32, "qformer_config.encoder_hidden_size": 32,
        "qformer_config.num_attention_heads": 4, "image_grid_pinpoints": [[128, 256]],
    },
    "instructblipvideo": {
        "video_token_index": 198, "image_token_index": 198, "num_query_tokens": 4,
        "qformer_config.encoder_hidden_size": 32,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_k25": {"vision_config.projection_hidden_size": 32, "projection_hidden_size": 32},
    "kimi_linear": {"num_experts_per_token": 2},
    "kosmos-2.5": {"latent_query_num": 4},
    "llama4": {
        "vision_config.projector_input_dim": 32, "vision_config.projector_output_dim": 32,
        "vision_config.intermediate_size": 128,
    },
    "llava_next": {"image_grid_pinpoints": [[56, 112]]},
    "llava_next_video": {"image_grid_pinpoints": [[56, 112]]},
    "llava_onevision": {"image_grid_pinpoints": [[56, 112]]},
    "longcat_flash": {"zero_expert_num": 2},
    "mllama": {"vision_config.intermediate_layers_indices": [0], "vision_config.vision_output_dim": 64},
    "minimax_m3_vl": {"merged_hidden_size": 128},
    "mamba2": {"num_heads": 8},
    "pp_formulanet": {"vision_config.decoder_hidden_size": 32},
    "molmo2": {
        "vision_config.num_position_embeddings": 16, "adapter_config.vision_feature_layer": [-1, -2],
        "adapter_config.hidden_size": 32, "adapter_config.text_hidden_size": 32,
        "image_patch_id": 190,
    },
    "muse_glimmer": {"vision_config.out_hidden_size": 128, "out_hidden_size": 128},
    "muse_spark": {"vision_config.out_hidden_size": 128, "out_hidden_size": 128},
    "nemotron_h_omni": {"vision_hidden_size": 32, "image_token_id": 190, "audio_token_id": 191},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "unlimited_ocr": {
        "vision_config.sam_config.downsample_channels": [32, 32], "vision_config.sam_config.global_attn_indexes": [1],
    },
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "step3p7": {"text_config.sliding_window": 4},
}  # fmt: skip


def shrunk(kind: str) -> Any:
    """The configuration of a model of this type at pico size."""
    config = full(kind)
    _shrink(config)
    complete(config, _HAND.get(kind, {}))
    _renumber(config)
    return config


def _shrink(config: Any) -> None:
    fields = vars(config)
    for name, value in list(fields.items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif name in _BY_BLOCK and isinstance(value, list):
            fields[name] = _kinds(value)
        elif name in _SIZE and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(value, _SIZE[name])
    blocks = [len(fields[name]) for name in _BY_BLOCK if isinstance(fields.get(name), list)]
    if blocks and "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = max(blocks)
        for name in _BY_BLOCK:
            if isinstance(fields.get(name), list):
                fields[name] = (fields[name] * 4)[: max(blocks)]
    patch = fields.get("patch_size")
    if isinstance(patch, int) and isinstance(fields.get("image_size"), int):
        fields["image_size"] = 4 * patch
    if fields.get("kv_lora_rank"):  # multi-head latent attention has as many keys as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields["head_dim"] = fields["qk_rope_head_dim"]
        if "qk_head_dim" in fields:
            fields["qk_head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and fields.get("num_attention_heads"):
        head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        half = int(head * rope.get("partial_rotary_factor", 1)) // 2
        fields["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _kinds(values: list[Any]) -> list[Any]:
    """Each kind of block once, in order; two at least."""
    found = [one for number, one in enumerate(values) if one not in values[:number]]
    return found if len(found) > 1 else found * 2


def _renumber(config: Any) -> None:
    """Token ids beyond the vocabulary get numbers at its end, the same for the same."""
    numbers: dict[int, int] = {}
    _renumber_in(config, numbers)


def _renumber_in(config: Any, numbers: dict[int, int]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _renumber_in(value, numbers)
        elif (
            name.endswith(("token_id", "token_index", "_token")) and isinstance(value, int) and value >= VOCABULARY - 50
        ):
            vars(config)[name] = numbers.setdefault(value, VOCABULARY - 1 - len(numbers))
