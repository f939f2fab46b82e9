"""Sparse low-rank updates W + M ⊙ BA with M = [W ≠ 0]: peft's adapters under the mask of the base weight.

Source: RESSA (arXiv 2404.02424).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from ecoflap.errors import InvalidOption, MissingDependency
from ecoflap.model.parts import Layer

if TYPE_CHECKING:
    from peft import PeftModel


def check_peft() -> None:
    """Raises MissingDependency if peft is not installed."""
    if find_spec("peft") is None:
        raise MissingDependency("--tune lora needs peft: pip install 'ecoflap[lora]'")


def adapted(model: nn.Module, layers: Iterable[Layer], rank: int) -> PeftModel:
    """``model`` with a masked low-rank update on each of ``layers``; only the updates are trained; α = 2 · rank.

    Args:
        layers: the pruned layers. Two kinds are skipped: weights that are used without a call of their module, which
            would not see the update, and slices of stacked experts, which are no modules.

    Raises:
        MissingDependency: peft is not installed.
        InvalidOption: there is no layer to adapt.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from ecoflap.run.finetune.sparse_adapter import SparseConv1D, SparseLinear

    names = [
        layer.module
        for layer in layers
        if not layer.uncalled and isinstance(model.get_submodule(layer.module), nn.Linear | Conv1D)
    ]
    if not names:
        raise InvalidOption("--tune lora: no pruned layer can take an update: train all weights, --tune full")
    pattern = "|".join(re.escape(name) for name in names)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({pattern})")
    config._register_custom_module({nn.Linear: SparseLinear, Conv1D: SparseConv1D})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are not adapted
        found: Any = get_peft_model(model, config)
    return found


def merged(model: PeftModel) -> nn.Module:
    """The model without adapters, with each update added to its weight; zeros stay zero.

    Raises:
        ValueError: a weight would not be finite.
    """
    found: nn.Module = model.merge_and_unload(safe_merge=True)
    return found
