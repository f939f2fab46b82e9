"""Pico language models with a real byte-level tokenizer, and multiple-choice questions in published formats."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import picos
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SUBJECTS = ("high_school_biology", "anatomy")
_WORDS = (
    "the", "cell", "has", "a", "membrane", "and", "red", "blood", "carries", "oxygen", "to", "each", "organ", "of",
    "body", "while", "bone", "is", "hard",
)  # fmt: skip


@lru_cache
def tokenizer(bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few sentences: words break into several tokens, blanks belong to the word after."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([" ".join(_WORDS), "Question: Answer: A. B. C. D.", "multiple choice"] * 3, trainer)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama(seed: int = 0, positions: int = 2048) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return picos.scramble(LlamaForCausalLM(config), seed).eval()


def t5(seed: int = 0) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return picos.scramble(T5ForConditionalGeneration(config), seed).eval()


def questions(path: Path, count: int = 12, seed: int = 0, subjects: bool = True) -> Path:
    """JSONL with the columns of MMLU on the hub: question, subject, choices, answer as a number."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        row: dict[str, Any] = {
            "question": " ".join(choose.choices(_WORDS, k=choose.randint(3, 9))) + "?",
            "choices": [" ".join(choose.sample(_WORDS, choose.randint(1, 4))) for _ in range(4)],
            "answer": choose.randrange(4),
        }
        rows.append({**row, "subject": SUBJECTS[number % 2]} if subjects else row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
