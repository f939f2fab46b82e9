"""peft's LoRA layers with an update that is zero where the base weight is zero; imported only if peft is needed."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class SparseLinear(Linear):  # type: ignore[misc]
    """y = x (W + M ⊙ s·BA)ᵀ + b with M = [W ≠ 0]. BA is formed in full, since the mask has no low rank."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M ⊙ s·BA in the shape of the stored weight; peft adds it when it merges."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta.masked_fill(self.get_base_layer().weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return self.get_base_layer()(x)  # type: ignore[no-any-return]
        # Recomputed in the backward pass: the stored sums of all layers would take as much memory as the model.
        found: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return found

    def _product(self, x: Tensor) -> Tensor:
        base = self.get_base_layer()
        weight = base.weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        found: Tensor = functional_call(base, {"weight": weight}, (x,))
        return found


class SparseConv1D(SparseLinear):
    """The same for transformers' ``Conv1D``, whose stored weight is (input, output)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = True
