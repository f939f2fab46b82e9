"""Text families at pico size: decoders, an encoder, encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import picos
import transformers
from families.family import Batches, Family
from torch import nn

SHAPE = {
    "vocab_size": len(picos.VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": picos.PAD, "eos_token_id": picos.EOS,
    "bos_token_id": picos.BOS,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
TEXT_PART = ("Gemma3", "Gemma3n", "Gemma4")  # whose configuration alone is that of a model of pictures and text
# The last two blocks read keys and values that the two before them computed, by a dictionary that all are handed.
SHARED_KEYS = {
    **GROUPED, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(picos.VOCABULARY),
}  # fmt: skip


def _build(name: str, config: dict[str, Any], head: str, seed: int = 0) -> nn.Module:
    """``transformers.<name>Config(**config)`` as ``transformers.<name><head>``, every weight drawn from ``seed``."""
    configuration = getattr(transformers, f"{name}{'Text' if name in TEXT_PART else ''}Config")(**config)
    return picos.scramble(getattr(transformers, f"{name}{head}")(configuration), seed)


def _decoder(name: str, model: str, config: dict[str, Any], batches: Callable[..., Batches]) -> Family:
    layers = config["num_hidden_layers"]
    build = partial(_build, model, config, "ForCausalLM")
    return Family(name, build, batches, (("language", layers),), processor=picos.tokenizer)


_CAUSAL, _SEQ2SEQ = picos.FAMILIES["llama"].batches, picos.FAMILIES["t5"].batches

DECODERS = tuple(
    _decoder(name, model, config, _CAUSAL)
    for name, model, config in (
        ("llama", "Llama", {**GROUPED, "num_hidden_layers": 3, "tie_word_embeddings": True}),
        ("mistral", "Mistral", {**GROUPED, "sliding_window": 4}),
        ("qwen2", "Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", "Qwen3", {**GROUPED, "head_dim": 16}),
        ("gemma2", "Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
        # Two local layers to one global: each kind gets rotary positions and a mask of its own from the parent.
        ("gemma3_text", "Gemma3", {
            **GROUPED, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        }),
        ("gemma3n_text", "Gemma3n", {**SHARED_KEYS, "laurel_rank": 4, "activation_sparsity_pattern": None}),
        ("gemma4_text", "Gemma4", {**SHARED_KEYS, "global_head_dim": 8}),
        ("phi3", "Phi3", {**GROUPED, "sliding_window": None}),
        ("olmo2", "Olmo2", GROUPED),
        ("opt", "OPT", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
        ("gpt_neox", "GPTNeoX", SHAPE),
        ("falcon", "Falcon", {**SHAPE, "alibi": True, "new_decoder_architecture": False}),
        ("bloom", "Bloom", {**SHAPE, "n_layer": 2, "n_head": 4}),
    )
)  # fmt: skip


def _t5(gated: bool, seed: int = 0) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu", relative_attention_num_buckets=8,
        relative_attention_max_distance=16, decoder_start_token_id=picos.PAD, pad_token_id=picos.PAD,
        eos_token_id=picos.EOS,
    )  # fmt: skip
    return picos.scramble(transformers.T5ForConditionalGeneration(config), seed)


BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": picos.PAD, "bos_token_id": picos.BOS, "eos_token_id": picos.EOS,
    "decoder_start_token_id": picos.EOS, "forced_eos_token_id": None,
}  # fmt: skip
_WITH_END = partial(picos.tokenizer, end=True)

OTHERS = (
    Family("gpt2", picos.gpt2, picos.FAMILIES["gpt2"].batches, (("language", 2),), processor=picos.tokenizer),
    Family("bert", picos.bert, picos.FAMILIES["bert"].batches, (("language", 2),), processor=picos.tokenizer),
    Family("t5", partial(_t5, False), _SEQ2SEQ, (("language", 2), ("language", 3)), processor=_WITH_END),
    Family("flan_t5", partial(_t5, True), _SEQ2SEQ, (("language", 2), ("language", 3)), processor=_WITH_END),
    Family(
        "bart", partial(_build, "Bart", BART, "ForConditionalGeneration"), _SEQ2SEQ,
        (("language", 2), ("language", 2)), processor=_WITH_END,
    ),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (*DECODERS, *OTHERS)
