"""Forward mode against the zeroth order: same noise, how well they agree, in fp32 and in bfloat16, and at what time.

   python benchmarks/forward_mode.py [embedded | FOLDER --calibration TEXT --sequence-length 64] [--layers 24]

The weights are rounded to bfloat16 first; "fp32" computes with them in fp32, "bfloat16" in their own dtype. Each way
measures the same layers (evenly spread over the model) on the same batches. Correlations and sizes are of the single,
signed estimates, with forward mode in fp32. Times are of the processor.
"""

from __future__ import annotations

import time

import torch
from replay import Kept, parser_of, prepared, spread
from torch import Tensor, nn

from ecoflap import measure_importance
from ecoflap.data.model_facts import Batch
from ecoflap.data.objectives import Objective
from ecoflap.importance.scores import Estimate
from ecoflap.model.parts import Anatomy

WAYS = ("forward mode, fp32", "zeroth order, fp32", "forward mode, bfloat16", "zeroth order, bfloat16")


def estimates(way: str, model: nn.Module, batches: list[Batch], loss: Objective, anatomy: Anatomy) -> list[Estimate]:
    """One way's estimates."""
    kept = Kept()
    name = "forward-mode" if way.startswith("forward") else "zeroth-order"
    options = {"precision": "native"} if way.endswith("bfloat16") else {}
    found = measure_importance(model, batches, name, loss=loss, anatomy=anatomy, journal=kept, **options)
    if "fallback" in found.settings:
        raise SystemExit(f"no forward mode: {found.settings['fallback']}")
    return kept.rows


def values(rows: list[Estimate]) -> Tensor:
    ordered = sorted(rows, key=lambda row: (row.layer, row.batch, row.draw))
    return torch.tensor([row.value for row in ordered], dtype=torch.float64)


def main() -> None:
    parser = parser_of(__doc__, 1)
    parser.add_argument("--layers", type=int, default=24, help="how many layers are measured; 0 for all")
    options = parser.parse_args()
    model, batches, objective, anatomy = prepared(options)
    model = model.to(torch.bfloat16)
    chosen = spread(anatomy, options.layers) if options.layers else anatomy
    print(f"{type(model).__name__}, {anatomy.total_parameters:,} parameters, {torch.get_num_threads()} threads")
    print(f"{len(chosen.layers)} of {len(anatomy.layers)} layers, {len(batches)} batches of {options.batch_size}")
    exact = None
    for way in WAYS:
        begin = time.process_time()
        found = values(estimates(way, model, batches, objective, chosen))
        seconds = time.process_time() - begin
        exact = found if exact is None else exact
        correlation = float(torch.corrcoef(torch.stack([exact, found]))[0, 1])
        size = float(found.abs().mean() / exact.abs().mean())
        print(f"{way:<24}{seconds:8.1f} s   correlation {correlation:.6f}   size {size:.3f}")


if __name__ == "__main__":
    main()
