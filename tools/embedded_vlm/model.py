"""The embedded VLM's architecture: a ``Blip2ForConditionalGeneration`` of 3.6 M weights."""

from __future__ import annotations

from typing import Any

from embedded_vlm.scenes import GRID
from embedded_vlm.tokenizer import END, IMAGE, PAD

WIDTH = 128
HEADS = 4
FEED_FORWARD = 512
IMAGE_SIZE = 48  # pictures of 64 pixels are shrunk: 36 patches instead of 64
PATCH = 8
VISION_BLOCKS = 6
QFORMER_BLOCKS = 3
TEXT_BLOCKS = 4  # in the encoder, and as many in the decoder
NUM_QUERIES = GRID * GRID
MAX_NEW_TOKENS = 32  # the longest caption has 28


def build_model(tokenizer: Any, seed: int) -> Any:
    """A freshly initialised model for ``tokenizer``; ``seed`` fixes the weights."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        GenerationConfig,
        T5Config,
    )

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("pad", PAD), ("end", END))}
    vision = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=VISION_BLOCKS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        initializer_range=0.02,  # the default, 1e-10, starts a tower that never leaves zero
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=QFORMER_BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        encoder_hidden_size=WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    text = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=FEED_FORWARD,
        num_layers=TEXT_BLOCKS,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=ids["pad"],
        eos_token_id=ids["end"],
        decoder_start_token_id=ids["pad"],
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=NUM_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.02)  # zeros by default: all queries would stay equal
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=ids["pad"],
        eos_token_id=ids["end"],
        decoder_start_token_id=ids["pad"],
    )
    return model
