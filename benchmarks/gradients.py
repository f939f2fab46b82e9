"""Gradient norms against the zeroth order: time and memory of each way of measuring the same thing, in one run.

    python benchmarks/gradients.py [embedded | FOLDER --calibration TEXT --sequence-length 128] [--layers 8]
                                   [--dtype bfloat16]

Each way runs in a process of its own on the same batches, one after the other. The zeroth order measures a few layers
evenly spread, and its time is scaled to all of them; a plain loop takes two forwards a (layer, batch). A model in half
precision (``--dtype``) is fp32 block by block; beside it, the same with the whole model converted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from apart import Failed, run_apart
from replay import parser_of, prepared, spread

from ecoflap import measure_importance
from ecoflap.data.objectives import on_device
from ecoflap.importance.base import ProbeContext
from ecoflap.model.patching import cache_disabled
from ecoflap.model.precision import computing_in_fp32, half_blocks
from ecoflap.run.provenance import Usage, measured

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward only": ("", {}),
    "zeroth order, plain loop": ("zeroth-order", {"replay": False}),
    "zeroth order, replay": ("zeroth-order", {}),
    "zeroth order, replay, block probes": ("zeroth-order", {"probe": "block"}),
    "gradient norm": ("gradient-norm", {}),
    "gradient norm, graph kept": ("gradient-norm", {"recompute": False}),
    "weight-gradient": ("first-order", {"variant": "weight-gradient"}),
    "Fisher": ("first-order", {"variant": "fisher"}),
}
# Of a half-precision model, whose blocks are else fp32 while they run:
UPCAST = ("zeroth order, replay", "gradient norm")
CONVERTED = {f"{way}, model converted": WAYS[way] for way in UPCAST}


def one(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the processor for all layers, and bytes above those of the loaded model."""
    model, batches, objective, anatomy = prepared(options, dtype=options.dtype)
    name, settings = {**WAYS, **CONVERTED}[way]
    few = spread(anatomy, options.layers) if name == "zeroth-order" and settings.get("probe") != "block" else anatomy
    usages: list[Usage] = []
    with measured(way, []):  # the first look at the memory settles
        time.sleep(0.1)
    base: list[Usage] = []
    with measured("nothing", base):
        time.sleep(0.1)
    begin = time.process_time()
    with measured(way, usages), computing_in_fp32(model) if way in CONVERTED else nullcontext():
        if name:
            measure_importance(model, batches, name, anatomy=few, loss=objective, **settings)
        else:
            context = ProbeContext(model, anatomy, batches, on_device(objective), seed=0)
            upcast = half_blocks(model, anatomy.replayable)
            with cache_disabled(model), torch.no_grad(), computing_in_fp32(model, upcast):
                for index in range(len(batches)):
                    context.loss(index)
    seconds = time.process_time() - begin
    return {
        "seconds": seconds * len(anatomy.layers) / len(few.layers),
        "bytes": usages[0].peak_memory_bytes - base[0].peak_memory_bytes,
        "model": float(sum(parameter.nbytes for parameter in model.parameters())),
    }


def main() -> None:
    parser = parser_of(__doc__, 2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=8, help="how many layers the zeroth order measures")
    parser.add_argument("--only", choices=[*WAYS, *CONVERTED], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options)))
        return
    results: dict[str, dict[str, float]] = {}
    for way in WAYS if options.dtype == "float32" else ("forward only", *UPCAST, *CONVERTED):
        try:
            results[way] = run_apart([*sys.argv, "--only", way])
        except Failed as why:
            sys.exit(f"{way}: {why}")
    plain, forward = results.get("zeroth order, plain loop"), results["forward only"]
    print("| way | CPU time, all layers | plain loop takes | peak above the model | peak, with model, to a forward's |")
    print("|---|---|---|---|---|")
    for way, found in results.items():
        ratio = (found["model"] + found["bytes"]) / (found["model"] + forward["bytes"])
        faster = "" if plain is None or way == "forward only" else f"{plain['seconds'] / found['seconds']:.1f} ×"
        print(f"| {way} | {found['seconds']:.1f} s | {faster} | {found['bytes'] / 2**20:.0f} MiB | {ratio:.2f} |")


if __name__ == "__main__":
    main()
