"""Decoding and reading a prompt with a packed model in the shape of a 1 B LLM, against Hugging Face's dense bfloat16.

    python benchmarks/packed_decode.py [--sparsity 0.5 0.6 0.7] [--layers 8] [--isa avx512 avx2]

One thread, processor time, interleaved rounds, medians of the rounds' ratios. Fewer layers than 22 make the head weigh
more, so the whole model gains more than what is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from ecoflap.model.packed import kernels
from ecoflap.run.bench_models import DENSE, BenchOptions, random_model


@torch.inference_mode()
def measure(sparsity: float, layers: int, rounds: int, prompt: int, isas: list[str]) -> None:
    subject = random_model(Path(), BenchOptions(layers=layers, sparsity=sparsity))
    variants = {name: model for name, model in subject.variants.items() if name != "dense float32"}
    long = torch.randint(3, 32000, (1, prompt))
    for isa in isas:
        if not kernels.choose(isa):
            continue
        reading: dict[str, list[float]] = {name: [] for name in variants}
        writing: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(rounds + 1):
            for name, model in variants.items():
                start = time.thread_time()
                out = model(input_ids=long, use_cache=True, logits_to_keep=1)
                middle = time.thread_time()
                for _ in range(4):
                    out = model(input_ids=long[:, :1], past_key_values=out.past_key_values, use_cache=True)
                if turn:
                    reading[name].append(middle - start)
                    writing[name].append((time.thread_time() - middle) / 4)
        for name in variants:
            faster = statistics.median(a / b for a, b in zip(writing[DENSE], writing[name], strict=True))
            longer = statistics.median(b / a for a, b in zip(reading[DENSE], reading[name], strict=True))
            token = 1e3 * statistics.median(writing[name])
            print(f"{subject.name}, {isa}, {name}: {token:.0f} ms a token, {faster:.2f} x dense bfloat16's speed; "
                  f"prompt of {prompt}: {longer:.2f} of its time", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--isa", nargs="+", default=["avx512", "avx2"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for sparsity in args.sparsity:
        measure(sparsity, args.layers, args.rounds, args.prompt, args.isa)


if __name__ == "__main__":
    main()
