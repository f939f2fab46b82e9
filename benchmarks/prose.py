"""Perplexity of a pruned language model on held-out prose: criteria × allocations × sparsities.

    python benchmarks/prose.py FOLDER --train prose-train.txt --test prose-test.txt --output results.json

Calibration windows and test windows are the same for all cells; each cell starts from the checkpoint. The importance is
read from ``--importance FILE`` (``ecoflap importance``). Finished cells are kept in the output and not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ecoflap import Importance, Recipe, prune
from ecoflap.evaluation import TASKS, TestData
from ecoflap.model.checkpoint import Checkpoint, load
from ecoflap.run.prepare import calibration_batches
from ecoflap.support.files import write_json


def perplexity(checkpoint: Checkpoint, test: str, windows: int, length: int) -> dict[str, float | None]:
    data = TestData(data=test, samples=windows, batch_size=8, sequence_length=length)
    result = TASKS.get("perplexity")().run(checkpoint.model, checkpoint.processor, data)
    return {"perplexity": result.value, "stderr": result.stderr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--importance", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--criteria", default="magnitude,wanda,sparsegpt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    done: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}

    def keep(cell: str, values: dict[str, Any]) -> None:
        done[cell] = values
        write_json(options.output, done)
        print(cell, json.dumps(values), flush=True)

    if "dense" not in done:
        keep("dense", perplexity(load(options.model), options.test, options.windows, options.sequence_length))
    scores: dict[str, str | Importance] = {"uniform": "uniform"}
    for pair in options.importance:
        name, _, path = pair.partition("=")
        scores[name] = Importance.load(path)
    recipe = Recipe.parse({
        "model": options.model, "calibration": options.train, "samples": options.samples, "batch_size": 8,
        "sequence_length": options.sequence_length, "seed": options.seed,
    })  # fmt: skip
    for sparsity in (float(part) for part in options.sparsities.split(",")):
        for name, importance in scores.items():
            for criterion in options.criteria.split(","):
                cell = f"{criterion} {name} {sparsity:g}"
                if cell in done:
                    continue
                checkpoint = load(options.model)
                _, batches = calibration_batches(recipe, checkpoint)
                begin = time.perf_counter()
                result = prune(checkpoint.model, batches, sparsity, importance=importance, criterion=criterion)
                seconds = time.perf_counter() - begin
                quality = perplexity(checkpoint, options.test, options.windows, options.sequence_length)
                keep(cell, {**quality, "sparsity": result.sparsity, "seconds": seconds})


if __name__ == "__main__":
    main()
