"""Mixtures whose experts are stacked in one parameter, in each layout that occurs, at pico size."""

from __future__ import annotations

from typing import Any

import picos
import torch
import transformers
from torch import nn

EXPERTS, CHOSEN, WIDTH, INNER = 4, 2, 16, 12
_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": picos.PAD, "bos_token_id": 1,
    "eos_token_id": picos.EOS, "tie_word_embeddings": False,
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    # [experts, 2 · inner, width] and [experts, width, inner]
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
                                       "intermediate_size": INNER}),
    # the same, beside shared experts; the router's shares are scaled
    "DeepseekV3": ("DeepseekV3ForCausalLM", {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": INNER, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 0, "intermediate_size": INNER, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4}),
    # transposed, gate and up interleaved, with biases
    "GptOss": ("GptOssForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
                                     "intermediate_size": INNER, "layer_types": ["full_attention"]}),
    # transposed, all experts in one product, tokens that are not sent are zeros; outside of transformers' interface
    "Llama4Text": ("Llama4ForCausalLM", {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": INNER, "moe_layers": [0],
        "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1, "layer_types": ["full_attention"]}),
}  # fmt: skip


def build(layout: str, seed: int = 0, **more: Any) -> nn.Module:
    """One block with a mixture, random weights, eval mode."""
    head, options = LAYOUTS[layout]
    config = getattr(transformers, f"{layout}Config")(**{**_SMALL, **options, **more})
    model: nn.Module = picos.scramble(getattr(transformers, head)(config), seed)
    return model.eval()


def batches(count: int = 2, rows: int = 3, length: int = 7, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            mask[row, length - row :] = 0
        ids = ids.masked_fill(mask == 0, picos.PAD)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found
