"""Stage 2 of a bfloat16 model with its own numbers and in fp32 block by block, in turns in one process.

``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/half_precision.py`` shows what a CPU without bf16
units does: oneDNN then uses none. Random weights in the shape of SmolLM2-135M's blocks; times of the processor.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ecoflap
from ecoflap.model.compute import product_ratio, settled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=options.layers,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(1024, (options.samples, options.length))
    batches = [{"input_ids": ids, "labels": ids}]
    print(f"a product of 256 rows: bfloat16 takes {product_ratio(torch.bfloat16):.2f} times as long as fp32")
    print(f"auto takes {settled('auto', model)} here")
    best: dict[str, float] = {}
    for _ in range(options.repeats):
        for compute in ("native", "float32"):
            dense = copy.deepcopy(model)
            begin = time.process_time()
            ecoflap.prune(dense, batches, 0.5, importance="uniform", criterion="wanda", compute_dtype=compute)
            best[compute] = min(best.get(compute, float("inf")), time.process_time() - begin)
    ratio = best["native"] / best["float32"]
    print(f"uniform Wanda: native {best['native']:.2f} s, float32 {best['float32']:.2f} s: {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
