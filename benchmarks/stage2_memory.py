"""Peak memory of stage 2 above the model: what the formula says (docs/memory.md) beside what is measured.

    python benchmarks/stage2_memory.py [--shapes tokens wide smollm2 mixture experts] [--output memory.json]

Models of random weights, two blocks each (one with a mixture in ``mixture`` and ``experts``); every case runs in a
process of its own, which prunes a few tokens first so that the libraries have what they need. Measured is the resident
memory, or what torch has allocated on a GPU. glibc is told to hand back what is freed (``MALLOC_MMAP_THRESHOLD_``), so
that what is held is measured; with ``--as-it-is`` it keeps holes. Pages of the file of ``disk`` are in memory
only while they are used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import memory
import torch
from apart import Failed, run_apart
from memory import expected_memory
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ecoflap.allocation import Allocation
from ecoflap.api import allocate, prune_to
from ecoflap.data.objectives import default_objective, on_device
from ecoflap.importance.scores import Importance
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled, trim
from ecoflap.pruning import walk
from ecoflap.pruning.sequential import EXPERTS_ROOM
from ecoflap.run.provenance import Usage, measured
from ecoflap.support.files import write_json

EXACT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
NEEDS = {"wanda": "norm", "sparsegpt": "gram", "admm": "pair"}


@dataclass(frozen=True)
class Shape:
    """A model's widths, and how much text it is calibrated on."""

    hidden: int
    intermediate: int
    heads: int
    batches: int
    batch_size: int
    tokens: int
    experts: int = 0  # of a mixture in each block, two for a token
    blocks: int = 2


SHAPES = {
    "tokens": Shape(256, 512, 4, 96, 16, 256),
    "wide": Shape(1536, 4096, 12, 2, 1, 256),
    "smollm2": Shape(576, 1536, 9, 4, 8, 256),
    "mixture": Shape(1024, 64, 8, 2, 2, 64, experts=24, blocks=1),
    "experts": Shape(1024, 32, 8, 4, 1, 128, experts=256, blocks=1),  # one Gram matrix for each: 1 GiB
}


def build(shape: Shape, device: str) -> nn.Module:
    """A language model of random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "dtype": torch.bfloat16,
    }  # fmt: skip
    if shape.experts:
        config = MixtralConfig(**sizes, num_local_experts=shape.experts, num_experts_per_tok=2)
        return MixtralForCausalLM._from_config(config).to(device).eval()
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes)).to(device).eval()


def one(shape: Shape, criterion: str, offload: str, device: str) -> dict[str, Any]:
    """Bytes above the model: expected and measured."""
    ids = torch.randint(
        256, (shape.batches, shape.batch_size, shape.tokens), generator=torch.Generator().manual_seed(0)
    )
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    few = [{"input_ids": ids[0, :1, :16], "labels": ids[0, :1, :16]}]

    def prune(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
        prune_to(model, *allocated(model), data, criterion=criterion, offload_activations=offload)

    def allocated(model: nn.Module) -> tuple[Anatomy, Allocation]:
        with cache_disabled(model):
            anatomy = discover(model, few[0], run=on_device(default_objective(model)))
        return anatomy, allocate(Importance.uniform(anatomy.layers, anatomy.total_parameters), sparsity=0.5)

    prune(build(replace(shape, experts=min(shape.experts, 2)), device), few)
    model = build(shape, device)
    anatomy, allocation = allocated(model)
    run = on_device(default_objective(model))
    expected = expected_memory(model, anatomy, batches, run, NEEDS[criterion], offload)
    usages: list[Usage] = []
    trim()
    with measured("before", usages):
        pass
    with measured("stage 2", usages):
        prune_to(model, anatomy, allocation, batches, criterion=criterion, offload_activations=offload)
    before, during = (
        usage.peak_cuda_bytes if usage.peak_cuda_bytes is not None and device != "cpu" else usage.peak_memory_bytes
        for usage in usages
    )
    return {**vars(expected), "expected": expected.total, "measured": during - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--criteria", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--offload", nargs="+", choices=["none", "cpu", "disk"], default=["none", "disk"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--as-it-is", action="store_true", help="leave the C library's allocator to its own ways")
    parser.add_argument("--room", type=int, default=EXPERTS_ROOM >> 20, help="MiB for statistics of experts at a time")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, criterion, offload = options.only
        walk.EXPERTS_ROOM = memory.EXPERTS_ROOM = options.room << 20  # of this process
        print(json.dumps(one(SHAPES[name], criterion, offload, options.device)))
        return
    environment = {**({} if options.as_it_is else EXACT), **os.environ}
    rows: list[dict[str, Any]] = []
    print("| shape | criterion | offload | inputs | statistics | working | forward | expected | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in ((s, c, o) for s in options.shapes for c in options.criteria for o in options.offload):
        try:
            found = run_apart(
                [__file__, "--device", options.device, "--room", str(options.room), "--only", *case], environment
            )
        except Failed as why:
            sys.exit(f"{' '.join(case)}: {why}")
        rows.append({"case": case, **found})
        parts = ("inputs", "statistics", "working", "forward", "expected", "measured")
        cells = [*case, *(f"{found[part] / 2**20:.0f} MiB" for part in parts)]
        print(f"| {' | '.join(cells)} | {found['measured'] / found['expected']:.2f} |", flush=True)
    if options.output:
        write_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
