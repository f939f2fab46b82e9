"""Stage 2 against the published loops of Wanda and SparseGPT: whole stage, same text, in turns, as ratios.

    git clone https://github.com/locuslab/wanda ~/wanda
    python benchmarks/stage2.py FOLDER --calibration TEXT --sequence-length 512 --samples 32 --published ~/wanda

The published functions run as they are, from the checkout, around today's decoder blocks: see ``published_loops.py``
beside this file. Without ``--published`` only ours is measured. Two times are told: by the clock, and of the processor,
which other work on the machine touches less. ``--in-turns`` runs the criteria in turns, and tells the ratio of each to
the first. Results are compared by the share of weights with the same fate in both,
and by the loss on the first batch of the calibration text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from published_loops import published_stage2
from replay import prepared
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.api import allocate, prune_to
from ecoflap.data.model_facts import Batch
from ecoflap.data.objectives import Objective, on_device
from ecoflap.importance.scores import Importance
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.support.files import write_json


@dataclass
class Way:
    """One way of pruning: its times in seconds, and what it left of the model."""

    prune: Callable[[], None]
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0

    def run(self) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        self.prune()
        self.processor.append(time.process_time() - processor)
        self.clock.append(time.perf_counter() - clock)


def first_blocks(anatomy: Anatomy, count: int) -> Anatomy:
    """The same anatomy with the first ``count`` blocks of its first tower alone."""
    tower = anatomy.towers[0]
    return replace(anatomy, towers=(replace(tower, blocks=tower.blocks[:count]),))


def loss_of(model: nn.Module, batch: Batch, objective: Objective) -> float:
    with torch.no_grad(), cache_disabled(model):
        return float(on_device(objective)(model, batch))


def compared(ways: dict[str, Way]) -> dict[str, float]:
    """Ratios of the published times to ours (medians), and how much of the masks agrees."""
    ours, theirs = ways["ours"], ways["published"]
    same = sum(int((ours.kept[name] == theirs.kept[name]).sum()) for name in ours.kept)
    return {
        "clock": statistics.median(theirs.clock) / statistics.median(ours.clock),
        "processor": statistics.median(theirs.processor) / statistics.median(ours.processor),
        "agreement": same / sum(mask.numel() for mask in ours.kept.values()),
    }


def in_turns(ways: dict[str, Way], model: nn.Module, dense: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """Times of each way in turns, and their medians' ratio to those of the first."""
    for repeat in range(repeats):
        for name in list(ways)[:: 1 if repeat % 2 else -1]:
            for layer, weight in dense.items():
                model.get_parameter(layer).data.copy_(weight)
            ways[name].run()
    first = next(iter(ways.values()))
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        clock, processor = statistics.median(way.clock), statistics.median(way.processor)
        ratios = clock / statistics.median(first.clock), processor / statistics.median(first.processor)
        print(f"{name:10} {clock:8.1f} s   processor {processor:8.1f} s   "
              f"ratio {ratios[0]:.2f}   processor {ratios[1]:.2f}", flush=True)  # fmt: skip
        rows[name] = {"clock": way.clock, "processor": way.processor, "ratio": ratios}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--calibration")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8, help="samples a forward of ours; theirs takes one")
    parser.add_argument("--dtype", default="auto", help="auto: the checkpoint's own")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--criteria", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--blocks", type=int, default=0, help="only the first so many blocks; 0 for all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-turns", action="store_true", help="the criteria against each other, not one by one")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="a checkout of github.com/locuslab/wanda")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    model, batches, objective, anatomy = prepared(options, options.samples, options.dtype)
    if options.blocks:
        anatomy = first_blocks(anatomy, options.blocks)
    uniform = Importance.uniform(anatomy.layers, anatomy.total_parameters)
    allocation = allocate(uniform, sparsity=options.sparsity)
    dense = {layer.name: model.get_parameter(layer.name).detach().clone() for layer in anatomy.layers}
    tokens = {tuple(value.shape) for batch in batches for name, value in batch.items() if name == "input_ids"}
    print(f"{type(model).__name__}, {model.dtype}, {anatomy.prunable_parameters:,} prunable weights, "  # type: ignore[attr-defined]
          f"{len(batches)} batches of {sorted(tokens)} tokens, {torch.get_num_threads()} threads")  # fmt: skip
    found: dict[str, Any] = {}
    if options.in_turns:
        found["in turns"] = in_turns(
            {name: Way(_ours(model, anatomy, allocation, batches, name, objective)) for name in options.criteria},
            model, dense, options.repeats,
        )  # fmt: skip
    for criterion in () if options.in_turns else options.criteria:
        ways = {"ours": Way(_ours(model, anatomy, allocation, batches, criterion, objective))}
        if options.published:
            ways["published"] = Way(
                published_stage2(options.published, model, anatomy, batches, criterion, options.sparsity)
            )
        for repeat in range(options.repeats):
            for name in list(ways)[:: 1 if repeat % 2 else -1]:
                for layer, weight in dense.items():
                    model.get_parameter(layer).data.copy_(weight)
                way = ways[name]
                way.run()
                if not way.kept:
                    way.kept = {layer: model.get_parameter(layer).detach() != 0 for layer in dense}
                    way.loss = loss_of(model, batches[0], objective)
        found[criterion] = {
            name: {"clock": way.clock, "processor": way.processor, "loss": way.loss} for name, way in ways.items()
        }
        for name, way in ways.items():
            print(f"{criterion:10} {name:10} {statistics.median(way.clock):8.1f} s   processor "
                  f"{statistics.median(way.processor):8.1f} s   loss {way.loss:.4f}")  # fmt: skip
        if len(ways) > 1:
            found[criterion]["ratio"] = ratio = compared(ways)
            print(f"{criterion:10} ratio      {ratio['clock']:8.2f}     processor {ratio['processor']:8.2f}     "
                  f"same fate {ratio['agreement']:.4f}", flush=True)  # fmt: skip
    if options.output:
        write_json(options.output, {"options": json.loads(json.dumps(vars(options), default=str)), **found})


def _ours(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: list[Batch],
    criterion: str,
    objective: Objective,
) -> Callable[[], None]:
    def prune() -> None:
        prune_to(model, anatomy, allocation, batches, criterion=criterion, loss=objective)

    return prune


if __name__ == "__main__":
    main()
