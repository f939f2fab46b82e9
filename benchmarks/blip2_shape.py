"""Replay on the shape of BLIP-2 FlanT5-XL: the bound that its shapes set, and a shrunk copy measured beside its own.

    python benchmarks/blip2_shape.py [--shrink 8] [--layers 21] [--output FILE]

The real model exists on the meta device alone: its operations are counted without computing them. The copy has random
weights, as many blocks, picture tokens and text tokens as the real one, and every width divided by ``--shrink``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bound import block_flops, block_seconds, replay_bound
from replay import in_turns, spread
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    PreTrainedModel,
    T5Config,
)

from ecoflap.data.objectives import default_objective, on_device
from ecoflap.model.anatomy import discover
from ecoflap.model.lazy_logits import logits_on_demand
from ecoflap.model.patching import cache_disabled

QUERIES, PATCHES = 32, 256
IMAGE_TOKEN = 1


def blip2(shrink: int = 1, blocks: int | None = None) -> PreTrainedModel:
    """BLIP-2 on FlanT5-XL with widths divided by ``shrink``; ``blocks`` limits each tower's number of them."""

    def at_most(count: int) -> int:
        return count if blocks is None else min(count, blocks)

    def wide(size: int) -> int:
        return size // shrink

    # How many heads there are changes no operation but the softmax; 16 do not divide every width.
    vision = Blip2VisionConfig(
        hidden_size=wide(1408), intermediate_size=wide(6144), num_hidden_layers=at_most(39), image_size=224,
        patch_size=14, num_attention_heads=16 if wide(1408) % 16 == 0 else 11,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=wide(768), intermediate_size=wide(3072), num_hidden_layers=at_most(12), num_attention_heads=12,
        encoder_hidden_size=wide(1408), cross_attention_frequency=2, vocab_size=wide(30522),
    )  # fmt: skip
    text = T5Config(
        vocab_size=wide(32128), d_model=wide(2048), d_kv=wide(64), d_ff=wide(5120), num_layers=at_most(24),
        num_decoder_layers=at_most(24), num_heads=32, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config).eval()


def batch_of(samples: int, prompt: int, answer: int, vocabulary: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random pictures and words: ``prompt`` tokens for the encoder, the pictures' among them, ``answer`` to be said."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, vocabulary, (samples, prompt), generator=generator)
    words[:, :QUERIES] = IMAGE_TOKEN
    made = {
        "pixel_values": torch.randn(samples, 3, 224, 224, generator=generator),
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "labels": torch.randint(2, vocabulary, (samples, answer), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def real_bound(options: argparse.Namespace) -> tuple[float, int]:
    """The bound of the real shape over all its matrices, and their number."""
    with torch.device("meta"):
        model = blip2(1, options.blocks)
    anatomy = discover(model, None)
    vocabulary = model.config.text_config.vocab_size
    batch = batch_of(1, options.prompt, options.answer, vocabulary, "meta")
    with torch.no_grad(), cache_disabled(model):
        flops, outside = block_flops(model, anatomy.replayable, lambda: parts(model, batch))
    return replay_bound(flops, outside, anatomy.layers), len(anatomy.layers)


def parts(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """The parts of a forward one after the other: looking for the places of picture tokens needs real numbers."""
    states = model.vision_model(batch["pixel_values"]).last_hidden_state
    queries = model.query_tokens.expand(len(states), -1, -1)
    model.language_projection(model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state)
    model.language_model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=8, help="what every width is divided by: 1, 2, 4, 8 or 16")
    parser.add_argument("--blocks", type=int, help="at most so many blocks a tower, for a quick look")
    parser.add_argument("--layers", type=int, default=21, help="how many matrices are measured, evenly spread")
    parser.add_argument(
        "--samples",
        type=int,
        default=16,
        help="samples in the batch; fewer, and calling small blocks costs more than computing them",
    )
    parser.add_argument("--prompt", type=int, default=40, help="tokens that the encoder reads, pictures' included")
    parser.add_argument("--answer", type=int, default=8, help="tokens that the decoder says")
    parser.add_argument("--threads", type=int, help="of this process; with small widths, one wastes the least")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    real, matrices = real_bound(options)
    print(f"real shape: {matrices} matrices, bound {real:.2f}")

    torch.manual_seed(0)
    model = blip2(options.shrink, options.blocks)
    batch = batch_of(options.samples, options.prompt, options.answer, model.config.text_config.vocab_size)
    objective = default_objective(model)
    with torch.no_grad(), cache_disabled(model):
        anatomy = discover(model, batch, run=on_device(objective))
        chosen = spread(anatomy, options.layers)

        def run() -> None:
            with logits_on_demand(model):
                objective(model, batch)

        bound = replay_bound(*block_flops(model, anatomy.replayable, run), chosen.layers)
        in_time = replay_bound(*block_seconds(model, anatomy.replayable, run), chosen.layers)
    found = in_turns(model, [batch], objective, chosen)
    found |= {"bound": bound, "bound_in_time": in_time, "real_bound": real, "real_matrices": matrices}
    print(f"widths divided by {options.shrink}, {len(chosen.layers)} of {len(anatomy.layers)} matrices")
    print(f"bound   {bound:8.2f}      by operations; {in_time:.2f} by the seconds that the blocks take here")
    print(f"plain   {found['plain']:8.2f} s a probe")
    print(f"replay  {found['replay']:8.2f} s a probe")
    print(f"ratio   {found['ratio']:8.2f}      estimates identical to the bit: {found['same']}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not found["same"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
