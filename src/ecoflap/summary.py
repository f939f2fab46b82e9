"""What ``metrics.json`` says beside quality: achieved sparsity, calibration samples, environment."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ecoflap.allocation import Allocation
from ecoflap.calibration.sources import SampleSet
from ecoflap.network.checkpoint import Checkpoint
from ecoflap.network.offload import home_of
from ecoflap.network.parts import Anatomy
from ecoflap.run import versions


def sparsity_summary(anatomy: Anatomy, allocation: Allocation) -> dict[str, Any]:
    """Achieved sparsity over the prunable weights, over all parameters, and per tower."""
    zeros = {row.name: round((row.achieved or 0.0) * row.weights) for row in allocation.layers}
    towers = {}
    for tower in anatomy.towers:
        count = sum(zeros[layer.name] for layer in tower.layers)
        towers[tower.name] = {
            "modality": tower.modality,
            "weights": tower.numel,
            "zeros": count,
            "sparsity": count / tower.numel,
        }
    total = sum(zeros.values())
    return {
        "prunable": total / anatomy.prunable_parameters,
        "model": total / anatomy.total_parameters,
        "prunable_parameters": anatomy.prunable_parameters,
        "model_parameters": anatomy.total_parameters,
        "towers": towers,
    }


def environment(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the numbers of a run were made."""
    device = home_of(checkpoint.model)
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "model_class": type(checkpoint.model).__name__,
    }


def calibration_record(sample_set: SampleSet | None, objective: str) -> dict[str, Any] | None:
    """Which samples were drawn from where, and the name of the loss that was taken on them."""
    if sample_set is None:
        return None
    return {
        "source": sample_set.source,
        "objective": objective,
        "columns": sample_set.columns,
        "skipped": sample_set.skipped,
        "indices": list(sample_set.indices),
    }
