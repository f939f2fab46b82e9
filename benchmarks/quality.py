"""Quality after pruning, as one table: allocations × criteria × sparsities × seeds, on three trained models.

    python benchmarks/quality.py embedded|smollm2|llava --output FILE.json [--methods uniform+admm,gradient-norm+admm] \
        [--sparsities 0.5,0.6,0.7,0.8] [--seeds 0,1,2] [--minutes 8]

A method is ALLOCATION+CRITERION[:NAME=VALUE;...] with options of the criterion, or ``pattern=2:4``, ``tokens=...`` and
``recover=true``. Finished cells are kept in the output and not done again, so that several calls can make a table;
``--minutes`` ends a call after the cell in which they are over. Each cell has the quality, the seconds of stage 2 (by
the clock and of the processor), and the highest resident memory during it above what was there before (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import assets
import llava
from real import write_questions

from ecoflap import Importance, Recipe
from ecoflap.api import allocate, inspect, prune_to
from ecoflap.data.objectives import resolve
from ecoflap.importance.measure import measure_importance
from ecoflap.model.checkpoint import Checkpoint, load
from ecoflap.pruning.registry import tokens_of
from ecoflap.run.evaluations import evaluate, evaluations_of
from ecoflap.run.prepare import calibration_batches
from ecoflap.support.files import write_json
from ecoflap.support.progress import Silent

METHODS = "uniform+wanda,uniform+sparsegpt,uniform+admm,gradient-norm+wanda,gradient-norm+sparsegpt,gradient-norm+admm"
APART = ("pattern", "tokens", "top_tokens", "recover", "samples")  # options of a method that are not the criterion's


def recipe_of(model: str, cache: Path, seed: int, samples: int | None) -> Recipe:
    """Model, calibration and test data of a row; what ``docs/results.md`` says of each."""
    more: dict[str, Any] = {"seed": seed} | ({} if samples is None else {"samples": samples})
    if model == "smollm2":
        prose = assets.fetch("prose", cache)
        more |= {
            "model": str(assets.fetch("smollm2", cache) / "safetensors"), "calibration": str(prose / "prose-train.txt"),
            "samples": samples or 32, "importance_samples": 8, "batch_size": 4, "sequence_length": 512,
            "task": "perplexity", "test": str(prose / "prose-test.txt"), "test_samples": 40,
        }  # fmt: skip
    elif model == "llava":
        folder = cache / "llava"
        if not (folder / "dense").exists():
            llava.build(folder / "dense", cache)
        for split in ("train", "test"):
            if not (folder / f"easy-vqa-{split}.jsonl").exists():
                write_questions(assets.fetch("easy-vqa", cache) / split, folder / f"easy-vqa-{split}.jsonl")
        more |= {
            "model": str(folder / "dense"), "calibration": str(folder / "easy-vqa-train.jsonl"), "budget": "tower",
            "task": "vqa", "test": str(folder / "easy-vqa-test.jsonl"), "test_samples": 500, "test_batch_size": 25,
        }  # fmt: skip
    return Recipe.parse(more)


def options_of(text: str) -> dict[str, Any]:
    """``NAME=VALUE;...`` with numbers and truth values as such."""
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(";")):
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


class Cells:
    """The cells of one model, of which the finished ones lie in a file."""

    def __init__(self, model: str, cache: Path, output: Path) -> None:
        self.model, self.cache, self.output = model, cache, output
        self.done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}

    def quality(self, checkpoint: Checkpoint, recipe: Recipe) -> float:
        (entry,) = evaluations_of(recipe)
        return float(evaluate(checkpoint, entry, recipe, Silent()).value)

    def keep(self, cell: str, values: dict[str, Any]) -> None:
        self.done[cell] = values
        write_json(self.output, self.done)
        print(time.strftime("%H:%M:%S"), cell, json.dumps(values), flush=True)

    def dense(self) -> None:
        recipe = recipe_of(self.model, self.cache, 0, None)
        self.keep("dense", {"quality": self.quality(load(recipe.model, device="cpu", dtype="float32"), recipe)})

    def scores(self, name: str, recipe: Recipe, checkpoint: Checkpoint, batches: Any, objective: Any) -> Importance:
        """The scores of a seed, measured once and kept beside the output."""
        file = self.output.with_suffix(f".{name}.{recipe.seed}.json")
        if name != "uniform" and file.exists():
            return Importance.load(file)
        begin = time.perf_counter()
        found = measure_importance(
            checkpoint.model, batches, name, samples=recipe.importance_samples, seed=recipe.seed, loss=objective
        )
        if name != "uniform":
            write_json(file, found.to_json())
            self.keep(f"importance {name} {recipe.seed}", {"clock": round(time.perf_counter() - begin, 1)})
        return found

    def cell(self, method: str, sparsity: float, seed: int) -> None:
        names, _, text = method.partition(":")
        allocation, _, criterion = names.partition("+")
        options = options_of(text)
        apart = {name: options.pop(name) for name in APART if name in options}
        recipe = recipe_of(self.model, self.cache, seed, apart.get("samples"))
        checkpoint = load(recipe.model, device="cpu", dtype="float32")
        _, batches = calibration_batches(recipe, checkpoint)
        objective = resolve(None, checkpoint.model)
        scores = self.scores(allocation, recipe, checkpoint, batches, objective)
        budget = recipe.budget if allocation != "uniform" else "global"
        pattern = apart.get("pattern", "unstructured")
        shares = allocate(scores, sparsity=sparsity, budget=budget, pattern=pattern)
        anatomy = inspect(checkpoint.model, batches[0])
        before, clock, processor = _memory("VmRSS", reset=True), time.perf_counter(), time.process_time()
        prune_to(
            checkpoint.model, anatomy, shares, batches, criterion=criterion, criterion_options=options, loss=objective,
            pattern=pattern, budget=budget, tokens=tokens_of(criterion, apart.get("tokens"), apart.get("top_tokens")),
            recover=apart.get("recover", False),
        )  # fmt: skip
        values = {
            "clock": round(time.perf_counter() - clock, 1),
            "processor": round(time.process_time() - processor, 1),
            "memory": round(_memory("VmHWM") - before),
        }
        self.keep(f"{method} {sparsity:g} {seed}", {"quality": self.quality(checkpoint, recipe), **values})

    def table(self, methods: list[str], sparsities: list[float], seeds: list[int]) -> None:
        """Mean ± standard deviation over the seeds that are done, in Markdown."""
        scale, digits = (1, 1) if self.model == "smollm2" else (100, 1)
        print("| method |", " | ".join(f"{p:g}" for p in sparsities), "| stage 2, processor s | memory MiB |")
        print("|---|" + "---|" * (len(sparsities) + 2))
        for method in methods:
            cells, times, memory = [], [], []
            for sparsity in sparsities:
                rows = [self.done[key] for seed in seeds if (key := f"{method} {sparsity:g} {seed}") in self.done]
                values = [scale * row["quality"] for row in rows]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
                times += [row["processor"] for row in rows]
                memory += [row["memory"] for row in rows]
            if times:
                print(f"| {method} |", " | ".join(cells), f"| {statistics.median(times):.0f} | {max(memory)} |")


def _memory(field: str, reset: bool = False) -> float:
    """MiB of ``VmRSS`` or ``VmHWM`` (the peak since the last reset) of this process; 0 without a /proc."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["embedded", "smollm2", "llava"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--sparsities", default="0.5,0.6,0.7,0.8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dense", action="store_true", help="measure the dense model, too")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--cache", type=Path, default=assets.default_cache())
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    methods = options.methods.split(",")
    sparsities = [float(part) for part in options.sparsities.split(",")]
    seeds = [int(part) for part in options.seeds.split(",")]
    try:
        cells = Cells(options.model, options.cache, options.output)
        if options.dense and "dense" not in cells.done:
            cells.dense()
        for seed in seeds:
            for sparsity in sparsities:
                for method in methods:
                    if f"{method} {sparsity:g} {seed}" in cells.done:
                        continue
                    if time.monotonic() > end:
                        print("time is over: the same command goes on")
                        sys.exit(3)
                    cells.cell(method, sparsity, seed)
        cells.table(methods, sparsities, seeds)
    except assets.AssetUnavailable as error:
        sys.exit(f"quality: {error}")


if __name__ == "__main__":
    main()
