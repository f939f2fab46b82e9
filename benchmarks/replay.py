"""Stage 1 with replay against the plain loop: same noise, same scores, time as a ratio in one run.

    python benchmarks/replay.py [embedded | FOLDER --calibration TEXT --sequence-length 128] [--layers 24]

Both ways measure the same layers (evenly spread over the model) on the same batches, in turns, batch by batch, each
first on every other batch. The estimates must agree to the bit. Times are of the processor; beside the ratio stands
the largest one that the model's shapes allow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from bound import block_flops, replay_bound
from torch import nn

from ecoflap import Recipe, measure_importance
from ecoflap.data.model_facts import Batch
from ecoflap.data.objectives import Objective, on_device, resolve
from ecoflap.importance.scores import Estimate
from ecoflap.model.anatomy import discover
from ecoflap.model.checkpoint import load
from ecoflap.model.lazy_logits import logits_on_demand
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.run.prepare import calibration_batches


class Kept:
    """A journal in memory."""

    def __init__(self) -> None:
        self.rows: list[Estimate] = []

    def estimates(self) -> Iterable[Estimate]:
        return ()

    def append(self, estimate: Estimate) -> None:
        self.rows.append(estimate)


def spread(anatomy: Anatomy, count: int) -> Anatomy:
    """The same anatomy with only ``count`` layers, evenly spread."""
    step = max(1, len(anatomy.layers) // count)
    chosen = {layer.name for layer in anatomy.layers[step // 2 :: step]}
    towers = tuple(
        replace(
            tower,
            blocks=tuple(replace(b, layers=tuple(one for one in b.layers if one.name in chosen)) for b in tower.blocks),
        )
        for tower in anatomy.towers
    )
    return replace(anatomy, towers=towers)


def prepared(
    options: argparse.Namespace, samples: int | None = None, dtype: str = "float32"
) -> tuple[nn.Module, list[Batch], Objective, Anatomy]:
    """Model, calibration batches, loss and anatomy that the command line asks for; by default ``--batches`` full."""
    values: dict[str, Any] = {
        "model": None if options.model == "embedded" else options.model,
        "calibration": options.calibration,
        "sequence_length": options.sequence_length,
        "samples": samples or options.batches * options.batch_size,
        "batch_size": options.batch_size,
    }
    recipe = Recipe.parse({name: value for name, value in values.items() if value is not None})
    checkpoint = load(recipe.model, dtype=dtype)
    _, batches = calibration_batches(recipe, checkpoint)
    objective = resolve(None, checkpoint.model)
    with cache_disabled(checkpoint.model):
        anatomy = discover(checkpoint.model, batches[0], run=on_device(objective))
    return checkpoint.model, batches, objective, anatomy


def parser_of(text: str | None, batches: int) -> argparse.ArgumentParser:
    """The options that :func:`prepared` reads; ``text`` is the help of the script, ``batches`` its own default."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--calibration")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=batches)
    return parser


def in_turns(model: nn.Module, batches: list[Batch], objective: Objective, chosen: Anatomy) -> dict[str, Any]:
    """Both ways on the same layers, batch by batch, each first on every other batch.

    Returns:
        ``plain`` and ``replay``: seconds of the processor a probe; ``ratio``; ``same``: estimates agree to the bit;
        ``probes``: estimates of each way.
    """
    seconds = {True: 0.0, False: 0.0}
    kept = {True: Kept(), False: Kept()}
    for index, batch in enumerate(batches):
        for with_replay in (True, False) if index % 2 else (False, True):
            begin = time.process_time()
            measure_importance(
                model,
                [batch],
                seed=index,
                anatomy=chosen,
                loss=objective,
                replay=with_replay,
                journal=kept[with_replay],
            )
            seconds[with_replay] += time.process_time() - begin
    probes = len(kept[True].rows)
    return {
        "plain": seconds[False] / probes,
        "replay": seconds[True] / probes,
        "ratio": seconds[False] / seconds[True],
        "same": kept[True].rows == kept[False].rows,
        "probes": probes,
    }


def main() -> None:
    parser = parser_of(__doc__, 4)
    parser.add_argument("--layers", type=int, default=24, help="how many layers are measured; 0 for all")
    options = parser.parse_args()
    model, batches, objective, anatomy = prepared(options)
    chosen = spread(anatomy, options.layers) if options.layers else anatomy
    with torch.no_grad(), cache_disabled(model), logits_on_demand(model):
        flops, outside = block_flops(model, anatomy.replayable, lambda: on_device(objective)(model, batches[0]))
    found = in_turns(model, batches, objective, chosen)
    print(f"{type(model).__name__}, {anatomy.total_parameters:,} parameters, {torch.get_num_threads()} threads")
    print(
        f"{len(chosen.layers)} of {len(anatomy.layers)} layers, {len(batches)} batches of {options.batch_size}: "
        f"{found['probes']} probes"
    )
    print(f"plain   {found['plain']:8.3f} s a probe")
    print(f"replay  {found['replay']:8.3f} s a probe")
    print(f"ratio   {found['ratio']:8.2f}      estimates identical to the bit: {found['same']}")
    print(f"bound   {replay_bound(flops, outside, chosen.layers):8.2f}      by the operations of the blocks")
    if not found["same"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
