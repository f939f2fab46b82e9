"""Time and peak memory of each stage on models of 1 to 8 billion weights, random ones, on a GPU.

    python benchmarks/gpu.py [--model NAME ...] [--samples 32] [--batch-size 4] [--published CHECKOUT]

Without a GPU it says so, and does the same with small twins of the shapes on the processor. Every way runs in a process
of its own. The zeroth order measures a few layers, evenly spread, and its time is scaled to all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from apart import Failed, run_apart
from gpu_models import SMALL, WHOLE, Shape
from published_loops import published_stage2
from replay import spread
from torch import nn

from ecoflap import Importance, allocate, measure_importance
from ecoflap.api import prune_to
from ecoflap.data.objectives import on_device, resolve
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.run.provenance import Usage, measured

STAGE_1: dict[str, tuple[str, dict[str, Any]]] = {
    "zeroth order, plain loop": ("zeroth-order", {"replay": False}),
    "zeroth order": ("zeroth-order", {}),
    "zeroth order, block probes": ("zeroth-order", {"probe": "block"}),
    "gradient norm": ("gradient-norm", {}),
    "first order, weight-gradient": ("first-order", {"variant": "weight-gradient"}),
    "first order, graph kept": ("first-order", {"variant": "weight-gradient", "recompute": False}),
}
STAGE_2 = ("wanda", "sparsegpt")
PUBLISHED = {f"{criterion}, published": criterion for criterion in STAGE_2}  # of one tower, a decoder as Llama's
WAYS = ("forward only", *STAGE_1, *STAGE_2, *PUBLISHED)


class Subject:
    """A random model of a shape on its device, in bfloat16, with its batches and anatomy."""

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.device):
            self.model: nn.Module = shape.build().eval()
        torch.set_default_dtype(torch.float32)
        random = torch.Generator().manual_seed(0)
        count = -(-options.samples // options.batch_size)
        self.batches = [shape.batch(options.batch_size, random) for _ in range(count)]
        self.loss = resolve(None, self.model)
        with cache_disabled(self.model):
            self.anatomy: Anatomy = discover(self.model, self.batches[0], run=on_device(self.loss))

    def forward(self) -> None:
        with cache_disabled(self.model), torch.no_grad():
            for batch in self.batches:
                on_device(self.loss)(self.model, batch)

    def stage_1(self, way: str, layers: int) -> float:
        """Returns what part of the work was done."""
        name, settings = STAGE_1[way]
        one_by_one = name == "zeroth-order" and settings.get("probe") != "block"
        few = spread(self.anatomy, layers) if one_by_one else self.anatomy
        measure_importance(self.model, self.batches, name, anatomy=few, loss=self.loss, **settings)
        return len(few.layers) / len(self.anatomy.layers)

    def stage_2(self, criterion: str) -> None:
        even = allocate(Importance.uniform(self.anatomy.layers, self.anatomy.total_parameters), 0.5)
        prune_to(self.model, self.anatomy, even, self.batches, criterion=criterion, loss=self.loss)

    def published(self, criterion: str, checkout: Path) -> None:
        published_stage2(checkout, self.model, self.anatomy, self.batches, criterion, 0.5)()


def one(shape: Shape, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the whole stage, and bytes: of the model, and of the peak above it."""
    subject = Subject(shape, options)
    if way != "forward only":
        subject.forward()  # kernels are chosen, caches filled
    held = [Usage("", 0, 0, 0)]
    with measured("held", held):
        pass
    usages: list[Usage] = []
    part = 1.0
    with measured(way, usages):
        if way in STAGE_1:
            part = subject.stage_1(way, options.layers)
        elif way in STAGE_2:
            subject.stage_2(way)
        elif way in PUBLISHED:
            subject.published(PUBLISHED[way], options.published)
        else:
            subject.forward()
        if subject.device == "cuda":
            torch.cuda.synchronize()
    return {
        "seconds": usages[0].seconds / part,
        "above": _bytes(usages[0]) - _bytes(held[-1]),
        "model": sum(p.nbytes for p in subject.model.parameters()),
        "weights": sum(p.numel() for p in subject.model.parameters()),
    }


def _bytes(usage: Usage) -> int:
    return usage.peak_memory_bytes if usage.peak_cuda_bytes is None else usage.peak_cuda_bytes


def table(name: str, found: dict[str, dict[str, float] | str]) -> list[str]:
    """Markdown: a row a way; a way that failed has its reason."""
    first = next((one for one in found.values() if isinstance(one, dict)), None)
    size = f"{first['weights'] / 1e9:.2f} B weights, {first['model'] / 2**30:.1f} GiB" if first else "nothing ran"
    lines = [f"### {name}: {size}", "", "| way | time | to Wanda | above the model | peak to a forward's |",
             "|---|---|---|---|---|"]  # fmt: skip
    wanda, forward = found.get("wanda"), found.get("forward only")
    for way, one in found.items():
        if isinstance(one, str):
            lines.append(f"| {way} | {one} | | | |")
            continue
        to_wanda = f"{one['seconds'] / wanda['seconds']:.2f} ×" if isinstance(wanda, dict) else ""
        peak = (
            f"{(one['model'] + one['above']) / (forward['model'] + forward['above']):.2f}"
            if isinstance(forward, dict)
            else ""
        )
        lines.append(f"| {way} | {one['seconds']:.1f} s | {to_wanda} | {one['above'] / 2**30:.2f} GiB | {peak} |")
    return [*lines, ""]


def run(name: str, way: str, arguments: Sequence[str]) -> dict[str, float] | str:
    """In a process of its own; the last line of its complaint where it fails."""
    try:
        return run_apart([__file__, *arguments, "--one", name, way])
    except Failed as why:
        return "out of memory" if "OutOfMemoryError" in str(why) else str(why)[:120].replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=[*WHOLE, *SMALL], help="default: all that fit the machine")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6, help="how many layers the zeroth order measures")
    parser.add_argument("--published", type=Path, help="a checkout of locuslab/wanda, whose loops run on the Llamas")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes: dict[str, Callable[[], Shape]] = {**WHOLE, **SMALL}
    if options.one:
        print(json.dumps(one(shapes[options.one[0]](), options.one[1], options)))
        return
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    else:
        print(f"no GPU here: small twins on the processor, torch {torch.__version__}\n", flush=True)
    arguments = [f"--samples={options.samples}", f"--batch-size={options.batch_size}", f"--layers={options.layers}"]
    arguments += [f"--published={options.published}"] if options.published else []
    results = {}
    for name in options.model or (WHOLE if torch.cuda.is_available() else SMALL):
        ways = [way for way in options.way or WAYS if way not in PUBLISHED or (options.published and "Llama" in name)]
        results[name] = {way: run(name, way, arguments) for way in ways}
        print("\n".join(table(name, results[name])), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
