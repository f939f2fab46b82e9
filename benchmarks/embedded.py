"""Accuracy of the embedded VLM after pruning: criteria × allocations × sparsities × seeds, on the bundled questions.

    python benchmarks/embedded.py --output embedded.json [--seeds 0,1,2] [--sparsities 0.4,0.5,0.6,0.7,0.8]

A seed draws the calibration samples and the noise. Finished cells are kept in the output and not done again; at the end
a table of means and standard deviations over the seeds is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from ecoflap import Importance, Recipe, measure_importance, prune
from ecoflap.data.objectives import resolve
from ecoflap.model.checkpoint import load
from ecoflap.run.evaluations import evaluate, evaluations_of
from ecoflap.run.prepare import calibration_batches
from ecoflap.support.files import write_json
from ecoflap.support.progress import Silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sparsities", default="0.4,0.5,0.6,0.7,0.8")
    parser.add_argument("--criteria", default="magnitude,wanda,sparsegpt")
    parser.add_argument("--importances", default="uniform,zeroth-order,first-order")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    sparsities = [float(part) for part in options.sparsities.split(",")]
    seeds = [int(part) for part in options.seeds.split(",")]
    criteria, importances = options.criteria.split(","), options.importances.split(",")

    for seed in seeds:
        scores: dict[str, Importance] = {}
        recipe = Recipe.parse({"seed": seed})
        for sparsity in sparsities:
            for importance in importances:
                for criterion in criteria:
                    cell = f"{criterion} {importance} {sparsity:g} {seed}"
                    if cell in done:
                        continue
                    checkpoint = load(None)
                    _, batches = calibration_batches(recipe, checkpoint)
                    objective = resolve(None, checkpoint.model)
                    if importance not in scores:
                        name, _, option = importance.partition(":")  # "zeroth-order:probe=block"
                        chosen = dict([option.split("=")]) if option else {}
                        scores[importance] = measure_importance(
                            checkpoint.model, batches, name, samples=32, seed=seed, loss=objective, **chosen
                        )
                    begin = time.perf_counter()
                    prune(
                        checkpoint.model, batches, sparsity, importance=scores[importance], criterion=criterion,
                        loss=objective, seed=seed,
                    )  # fmt: skip
                    seconds = time.perf_counter() - begin
                    (entry,) = evaluations_of(recipe)
                    result = evaluate(checkpoint, entry, recipe, Silent())
                    done[cell] = {"accuracy": result.value, "groups": result.by_group, "seconds": seconds}
                    write_json(options.output, done)
                    print(cell, f"{100 * result.value:.1f}", f"{seconds:.1f} s", flush=True)

    print("| criterion | allocation |", " | ".join(f"{p:g}" for p in sparsities), "|")
    print("|---|---|" + "---|" * len(sparsities))
    for criterion in criteria:
        for importance in importances:
            cells = []
            for sparsity in sparsities:
                values = [100 * done[f"{criterion} {importance} {sparsity:g} {seed}"]["accuracy"] for seed in seeds]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            print(f"| {criterion} | {importance} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
