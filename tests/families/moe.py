"""Mixtures of experts at pico size: with experts that are modules of their own, and with stacked ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import picos
import torch
import transformers
from families.family import Family
from families.text import GROUPED
from torch import Tensor, nn

EXPERTS, CHOSEN = 4, 2


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Every token goes to the ``chosen`` experts that its router likes best; experts see their tokens alone."""

    def __init__(self, width: int, inner: int, chosen: int = CHOSEN) -> None:
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = self.gate(flat).softmax(-1).topk(self.chosen, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                out = out.index_add(0, tokens, expert(flat[tokens]) * shares[tokens, place, None])
        return out.reshape(x.shape)


def mixture_of_modules(seed: int = 0) -> nn.Module:
    """A LLaMA whose second block has a mixture of experts in the place of its MLP."""
    config = transformers.LlamaConfig(**{**GROUPED, "tie_word_embeddings": False})
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[1].mlp = Mixture(config.hidden_size, 16)
    return picos.scramble(model, seed)


def _build(name: str, config: dict[str, Any], head: str = "ForCausalLM", seed: int = 0) -> nn.Module:
    configuration = getattr(transformers, f"{name}Config")(**config)
    return picos.scramble(getattr(transformers, f"{name}{head}")(configuration), seed)


SWITCH = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "num_experts": EXPERTS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": picos.PAD,
    "eos_token_id": picos.EOS, "decoder_start_token_id": picos.PAD,
}  # fmt: skip
STACKED = {**GROUPED, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}

FAMILIES: tuple[Family, ...] = (
    Family("mixture_of_modules", mixture_of_modules, picos.FAMILIES["llama"].batches, (("language", 2),)),
    Family(
        "switch_transformers", partial(_build, "SwitchTransformers", SWITCH, "ForConditionalGeneration"),
        picos.FAMILIES["t5"].batches, (("language", 2), ("language", 2)), processor=partial(picos.tokenizer, end=True),
    ),
    Family(
        "mixtral", partial(_build, "Mixtral", STACKED), picos.FAMILIES["llama"].batches, (("language", 2),),
        processor=picos.tokenizer,
    ),
    Family(
        "qwen3_moe",
        partial(_build, "Qwen3Moe", {
            **GROUPED, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 16,
            "head_dim": 8,
        }),
        picos.FAMILIES["llama"].batches, (("language", 2),), processor=picos.tokenizer,
    ),
)  # fmt: skip
