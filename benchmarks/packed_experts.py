"""Stacked experts, packed against dense: the mixtures of a random Mixtral, without attention, head and embeddings.

    python benchmarks/packed_experts.py [--sparsity 0.5 0.7] [--dtype bfloat16 float32] [--experts 8] [--layers 4]

Each pass sends random tokens through every layer's mixture: one token (decoding) or --prompt tokens. Dense and packed
take turns; printed are medians of the rounds' ratios of times, dense to packed: above 1, packed is faster.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import MixtralConfig, MixtralModel

import ecoflap


def mixtures(args: argparse.Namespace, sparsity: float, dtype: torch.dtype) -> nn.Module:
    """The layers' mixtures of a random model, with a share of zeros in all experts."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=args.hidden, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=args.experts, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralModel._from_config(config, dtype=dtype, experts_implementation=args.implementation)
    found = nn.ModuleList(layer.mlp for layer in model.layers).to_empty(device="cpu").eval()
    for parameter in found.parameters():
        parameter.data.normal_(std=0.02)
        if parameter.dim() == 3:
            for one in parameter.data:
                one[torch.rand(one.shape) < sparsity] = 0
    return found


def run(layers: nn.Module, inputs: list[torch.Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):  # type: ignore[call-overload]
        layer(x)


@torch.inference_mode()
def measure(args: argparse.Namespace, sparsity: float, dtype: torch.dtype) -> None:
    dense = mixtures(args, sparsity, dtype)
    packed = copy.deepcopy(dense)
    told = ecoflap.pack(packed, values=args.values)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for tokens in (1, args.prompt):
        times: dict[str, list[float]] = {"dense": [], "packed": []}
        for turn in range(args.rounds + 1):
            inputs = [torch.randn(1, tokens, args.hidden).to(dtype) for _ in dense]  # another choice of experts
            for name, layers in (("dense", dense), ("packed", packed)):
                start = clock()
                run(layers, inputs)
                if turn:
                    times[name].append(clock() - start)
        ratio = statistics.median(a / b for a, b in zip(times["dense"], times["packed"], strict=True))
        milliseconds = [1e3 * statistics.median(times[name]) / args.layers for name in ("dense", "packed")]
        print(
            f"{args.implementation} {str(dtype)[6:]} {args.values} sparsity={sparsity} tokens={tokens}: bytes "
            f"{told.packed_bytes / told.dense_bytes:.3f}, dense {milliseconds[0]:.2f} ms a layer, packed "
            f"{milliseconds[1]:.2f} ms, speed {ratio:.2f} x dense",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--values", default="auto", choices=("auto", "int8", "int4"))
    parser.add_argument("--implementation", default="grouped_mm", choices=("eager", "grouped_mm", "batched_mm"))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for dtype in args.dtype:
        for sparsity in args.sparsity:
            measure(args, sparsity, getattr(torch, dtype))


if __name__ == "__main__":
    main()
