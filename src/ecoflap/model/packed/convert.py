"""Packs the sparse layers of a model in place, and unpacks them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.errors import InvalidOption
from ecoflap.model.experts import flat_stacks, lies_transposed
from ecoflap.model.packed.format import PackedWeight, checked_group_size, pack_weight, unpack_weight, worth_packing
from ecoflap.model.packed.linear import PackedLinear
from ecoflap.model.packed.owners import owner_with, owner_without
from ecoflap.model.packed.stack import PackedStack, as_packed, stacks_of


@dataclass(frozen=True)
class PackedModel:
    """The result of :func:`pack`.

    Attributes:
        layers: path of each packed layer.
        dense_bytes: of their weights before.
        packed_bytes: of their weights now.
        other_bytes: of all other parameters and buffers, which are unchanged.
        error: ‖W - Ŵ‖ / ‖W‖ over all packed weights with the rounded weights Ŵ; 0 for "auto".
    """

    layers: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int
    other_bytes: int
    error: float = 0.0


@dataclass
class Packing:
    """Packs one layer after another, and sums sizes and errors."""

    values: str
    group_size: int
    layers: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0
    other_bytes: int = 0
    _off: float = 0.0
    _size: float = 0.0

    def add(self, path: str, rows: Tensor) -> PackedWeight:
        """Pack the (outputs, inputs) weight of the layer at ``path``."""
        packed = pack_weight(rows, self.values, self.group_size)
        if self.values != "auto":
            self._off += float((unpack_weight(packed) - rows.float()).square().sum())
            self._size += float(rows.float().square().sum())
        self.layers.append(path)
        self.dense_bytes += rows.nbytes
        self.packed_bytes += packed.nbytes
        return packed

    def result(self, of: str) -> PackedModel:
        """The sums for the model ``of``. Raises InvalidOption if nothing was packed."""
        if not self.layers:
            raise InvalidOption(f"no layer of {of} has enough zeros to get smaller: prune it first")
        error = math.sqrt(self._off / self._size) if self._size else 0.0
        return PackedModel(tuple(self.layers), self.dense_bytes, self.packed_bytes, self.other_bytes, error)


def pack(model: nn.Module, *, values: str = "auto", group_size: int | None = None) -> PackedModel:
    """Pack the weights of linear layers (``nn.Linear``, transformers' Conv1D) and stacked experts with enough zeros.

    It works in place. The outputs are the same up to the rounding of float32 sums ("auto"), the model needs less
    memory, and ``save_pretrained`` writes a packed checkpoint. Shared weights, and layers with less than about a tenth
    of zeros, stay dense.

    Args:
        values: "auto" keeps the dtype and every bit; "int8" and "int4" round the nonzeros to 8 or 4 bits.
        group_size: columns that share a scale of rounded values, a multiple of 64; 0: the whole row. None: 0 for int8,
            128 for int4.

    Raises:
        InvalidOption: unknown ``values`` or group size, weights that are not in memory, or nothing to pack.
    """
    packing = Packing(values, checked_group_size(values, group_size))
    for name, layer in list(packable(model)):
        if layer.weight.is_meta:
            raise InvalidOption(f"'{name}' is not in memory: load the model without a device map to pack it")
        if not worth_packing(layer.weight):
            continue
        turned = not isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        packed = packing.add(name, weight.t().contiguous() if turned else weight)
        replace(model, name, PackedLinear(packed, layer.bias, transposed=turned, dtype=weight.dtype))
    for name, owner, parameter, turned, flat in list(stackable(model)):
        if parameter.is_meta:
            raise InvalidOption(f"'{name}' is not in memory: load the model without a device map to pack it")
        if worth_packing(parameter):
            packed = packing.add(name, as_packed(parameter.detach(), turned, flat))
            stack = PackedStack(packed, transposed=turned, flat=bool(flat), dtype=parameter.dtype)
            owner_with(owner, name.rpartition(".")[2], stack)
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    packing.other_bytes = sum(seen.values()) - packing.packed_bytes
    result = packing.result(type(model).__name__)
    if hasattr(model, "save_pretrained"):
        from ecoflap.model.packed.quantizer import mark

        mark(model, values, packing.group_size)
    return result


def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace packed layers by plain ones in ``dtype`` (None: each keeps its own); return ``model``."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]:
        weight = layer.dense_weight(dtype)
        plain: Any
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=True)
        plain.bias = layer.bias
        plain.train(layer.training)
        replace(model, name, plain)
    for name, stack in list(stacks_of(model).items()):
        path, _, leaf = name.rpartition(".")
        owner_without(model.get_submodule(path), leaf, nn.Parameter(stack.dense_weight(dtype)))
    return model


def packable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers by path, without those whose weight other modules share or read."""
    owners = Counter(
        id(weight) for module in model.modules() if (weight := module._parameters.get("weight")) is not None
    )
    inside = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)  # multiplies by its projections' weights itself
        for name, _ in module.named_modules()
    }
    for name, module in model.named_modules():
        if is_linear(module) and name and name not in inside and owners[id(module.weight)] == 1:
            yield name, module


def stackable(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, bool, int]]:
    """Unshared parameters that may stack matrices: name, module, parameter, whether transposed, number if flat.

    They have three dimensions; or two, with that number of matrices concatenated. If it is unknown whether they are
    transposed, they are taken as not transposed: correct, but maybe slower.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        flat = flat_stacks(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            if (parameter.dim() == 3 or leaf in flat) and owners[id(parameter)] == 1 and not convolution:
                count, turned = flat.get(leaf, (0, bool(lies_transposed(module))))
                yield f"{path}.{leaf}" if path else leaf, module, parameter, turned, count


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of torch's own class or transformers' Conv1D."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the path ``name``."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
