"""Memory that windows of text take: what the default sequence length reckons with, beside what is measured.

    python benchmarks/window_memory.py [--models smollm2 gemma3 t5 llama] [--work forward gradient-norm admm]

Models of random weights, with the widths of real ones and a few blocks. Each case runs in a process of its own, at two
lengths: the difference of the two peaks of resident memory is what longer windows take, without the model and without
what depends on it alone (statistics, inverses). glibc is told to hand back what is freed. ``forward`` is one batch of a
perplexity; the others read all calibration windows.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from apart import run_apart
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ecoflap.api import allocate, prune_to
from ecoflap.data.computing import first_run
from ecoflap.data.objectives import default_objective
from ecoflap.data.window_length import forward_bytes, gradient_bytes, walk_bytes
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.scores import Importance
from ecoflap.model.anatomy import discover
from ecoflap.model.patching import cache_disabled, trim
from ecoflap.run.provenance import Usage, measured
from ecoflap.support.files import write_json

EXACT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
SHORT, LONG = 128, 512  # tokens of a window
# Of SmolLM2-135M, Gemma 3 270M, FLAN-T5-small and Llama 3.2 1B, but for the number of blocks.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 6,
        "num_layers": 4, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
}  # fmt: skip
WORK = ("forward", "gradient-norm", "admm")


def build(name: str, dtype: str) -> PreTrainedModel:
    """A language model of random weights."""
    torch.manual_seed(0)
    options = dict(MODELS[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config, dtype=getattr(torch, dtype)).eval()


def do(model: PreTrainedModel, work: str, ids: torch.Tensor, batch_size: int) -> None:
    """One piece of work on windows (N, length); an encoder-decoder gets their halves, as calibration has it."""
    texts, answers = ids.chunk(2, dim=1) if model.config.is_encoder_decoder else (ids, ids)
    parts = zip(torch.split(texts, batch_size), torch.split(answers, batch_size), strict=True)
    batches = [{"input_ids": text.contiguous(), "labels": answer.contiguous()} for text, answer in parts]
    if work == "forward":
        with torch.no_grad():
            model(input_ids=ids[:batch_size], use_cache=False)
        return
    if work == "gradient-norm":
        measure_importance(model, batches, work)
        return
    with cache_disabled(model):
        anatomy = discover(model, batches[0], run=first_run(default_objective(model)))
    sparse = allocate(Importance.uniform(anatomy.layers, anatomy.total_parameters), sparsity=0.5)
    prune_to(model, anatomy, sparse, batches, criterion=work)


def one(name: str, work: str, length: int, windows: int, batch_size: int, dtype: str) -> dict[str, int]:
    """Bytes of resident memory at the peak, above the model; and what the formula says."""
    model = build(name, dtype)
    ids = torch.randint(1000, (windows, length), generator=torch.Generator().manual_seed(0))
    do(build("smollm2", dtype), work, ids[:1, :16], 1)
    usages: list[Usage] = []
    trim()
    with measured("before", usages):
        pass
    with measured(work, usages):
        do(model, work, ids, batch_size)
    before, during = (usage.peak_memory_bytes for usage in usages)
    reckoned = {
        "forward": lambda: forward_bytes(model, length, batch_size, logits=True),
        "gradient-norm": lambda: gradient_bytes(model, length, batch_size),
        "admm": lambda: walk_bytes(model, length, windows, batch_size),
    }[work]()
    return {"measured": during - before, "formula": reckoned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    same = [str(part) for name in ("windows", "batch_size", "dtype")
            for part in (f"--{name.replace('_', '-')}", getattr(options, name))]  # fmt: skip
    if options.only:
        name, work, length = options.only
        found = one(name, work, int(length), options.windows, options.batch_size, options.dtype)
        print(json.dumps(found))
        return
    rows = []
    print("| model | work | formula | measured | ratio |\n|---|---|---|---|---|")
    for name in options.models:
        for work in options.work:
            if work == "forward" and MODELS[name]["model_type"] == "t5":
                continue  # an encoder-decoder has no perplexity
            short, long = (
                run_apart([__file__, *same, "--only", name, work, str(length)], {**EXACT, **os.environ})
                for length in (SHORT, LONG)
            )
            row = {"model": name, "work": work, **{key: long[key] - short[key] for key in long}}
            rows.append(row)
            sizes = [f"{row[key] / 2**20:.0f} MiB" for key in ("formula", "measured")]
            print(f"| {name} | {work} | {' | '.join(sizes)} | {row['measured'] / row['formula']:.2f} |", flush=True)
    if options.output:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
