"""Sparse pico checkpoints, recipes of a few steps, and what all fine-tunings must keep."""

from __future__ import annotations

from pathlib import Path

import picos
import torch
from console import model_weights

from ecoflap.run.finetune.recipe import Finetune


def sparse_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, share: float = 0.5) -> Path:
    """A pico checkpoint whose linear layers inside blocks have this share of zeros."""
    model = picos.FAMILIES[name].build(seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in path.split(".")):
                module.weight.masked_fill_(torch.rand(module.weight.shape, generator=generator) < share, 0)
    model.to(dtype).save_pretrained(folder)
    picos.processor(name).save_pretrained(folder)
    return folder


def recipe_of(model: Path, train: Path, **fields: object) -> Finetune:
    """A few steps with a high rate."""
    given = {"batch_size": 4, "epochs": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "warmup": 0.0, **fields}
    return Finetune.parse({"model": str(model), "train": str(train), **given})


def same_zeros(before: Path, after: Path) -> None:
    """Where the pruned layers are zero, the trained ones have the bits of +0; elsewhere something has moved."""
    old, new = model_weights(before), model_weights(after)
    assert old.keys() == new.keys()
    moved = 0
    for name, weight in old.items():
        assert new[name].dtype == weight.dtype
        if weight.dim() == 2 and bool((weight == 0).any()) and "embed" not in name:
            at_zeros = new[name][weight == 0]
            assert not at_zeros.any(), name
            assert not torch.signbit(at_zeros).any(), name
        moved += not torch.equal(weight, new[name])
    assert moved > 5
