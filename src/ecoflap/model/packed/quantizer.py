"""Registers packed checkpoints as a quantisation method, for ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ecoflap.errors import CheckpointError
from ecoflap.model.experts import flat_stacks
from ecoflap.model.packed.convert import is_linear, pack, replace, unpack
from ecoflap.model.packed.format import GROUP_SIZES, GROUP_STEP, STORED, VALUES, PackedWeight
from ecoflap.model.packed.holder import PackedParts
from ecoflap.model.packed.linear import PackedLinear
from ecoflap.model.packed.owners import owner_with
from ecoflap.model.packed.stack import PackedStack, stacks_of

METHOD = "ecoflap"
VERSION = 3  # 1 has no stacked experts, 2 no column scales


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of a packed checkpoint's ``config.json``.

    Args:
        format: "bitmask", the only one.
        values: "auto", "int8" or "int4", as in :func:`ecoflap.pack`.
        group_size: columns that share a scale of rounded values; 0: the whole row. None: the default of ``values``.
        layers: number of stored values (for int4, of bytes) by packed layer or parameter of stacked experts.
        transposed: those whose file holds the transpose of the layer's weight, or of each of the stacked matrices.
        flat: 2-dimensional parameters of concatenated matrices, which the file holds as 3-dimensional ones.
        column_scales: whether rounded values also have column scales.
        version: of the format; 3 with column scales, else 2 if experts are packed.

    Raises:
        CheckpointError: a newer version or another format, or entries that can't be read.
    """

    def __init__(
        self,
        format: str = "bitmask",
        values: str = "auto",
        group_size: int | None = None,
        layers: dict[str, int] | None = None,
        transposed: list[str] | None = None,
        version: int = 1,
        flat: list[str] | None = None,
        column_scales: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.format, self.values, self.version = format, values, version
        self.group_size: Any = GROUP_SIZES.get(str(values), 0) if group_size is None else group_size
        self.layers, self.transposed, self.flat = layers or {}, transposed or [], flat or []
        self.column_scales = column_scales
        self._refuse_others()

    def _refuse_others(self) -> None:
        if not isinstance(self.version, int) or self.version > VERSION or self.format != "bitmask":
            raise CheckpointError(
                f"the checkpoint is packed in format '{self.format}' {self.version}, and this ecoflap reads 'bitmask' "
                f"up to {VERSION}: install a newer ecoflap"
            )
        whole = (
            self.values in VALUES
            and isinstance(self.group_size, int)
            and self.group_size >= 0
            and self.group_size % GROUP_STEP == 0
            and isinstance(self.layers, dict)
            and all(isinstance(count, int) and 0 <= count < 1 << 48 for count in self.layers.values())
            and isinstance(self.transposed, list)
            and isinstance(self.flat, list)
            and isinstance(self.column_scales, bool)
        )
        if not whole:
            raise CheckpointError("the quantization_config in config.json is damaged: download or pack the model again")


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model before its weights are loaded, and checks them afterwards."""

    requires_calibration = False
    is_trainable = True  # except for the packed weights; Trainer checks this even to evaluate
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **__: Any) -> bool:
        """True for parts of packed weights: their shapes may differ from the model's, and are checked after loading."""
        path, _, name = param_name.rpartition(".")
        return isinstance(model.get_submodule(path), PackedParts) and name != "bias"

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if not self.pre_quantized:
            return model
        config = self.quantization_config
        for path, count in config.layers.items():
            flat = path in config.flat
            if (found := _find(model, path, flat)) is None:
                continue  # of a head that this class does not have
            name, layer = found
            turned = path in config.transposed
            stacked = isinstance(layer, nn.Parameter)
            weight: Any = layer if stacked else layer.weight
            size = tuple(weight.shape)
            if flat:
                count_of = _flat_count(model, name)
                size = (count_of, size[0] // count_of, size[1])
            size = (*size[:-2], size[-1], size[-2]) if turned else size
            packed = _empty(size, count, weight.dtype, config, name)
            with torch.device("meta"):
                if stacked:
                    owner, leaf = name.rpartition(".")[::2]
                    stack = PackedStack(packed, transposed=turned, flat=flat, dtype=weight.dtype)
                    owner_with(model.get_submodule(owner), leaf, stack)
                else:
                    replace(model, name, PackedLinear(packed, layer.bias, transposed=turned, dtype=weight.dtype))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if not self.pre_quantized:
            pack(model, values=self.quantization_config.values, group_size=self.quantization_config.group_size)
            return model
        for name, layer in model.named_modules():
            if not isinstance(layer, PackedParts):
                continue
            for part, tensor in [*layer.named_parameters(), ("shape", layer.shape)]:
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"the packed weight '{name}' lacks its {part}: download or pack it again")
            layer.verify(name)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return unpack(model)


def mark(model: Any, values: str, group_size: int) -> None:
    """Tell transformers that ``model`` is packed, so that it saves the model as such."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    stacks = stacks_of(model)
    layers: dict[str, PackedParts] = {**linear, **stacks}
    config = PackedConfig(
        values=values,
        group_size=group_size,
        layers={name: layer.compressed.numel() for name, layer in layers.items()},
        transposed=[name for name, layer in layers.items() if layer.transposed],
        flat=[name for name, stack in stacks.items() if stack.flat],
        **versioned(values, bool(stacks)),
    )
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config)
    model.is_quantized, model.quantization_method = True, METHOD


def versioned(values: str, stacks: bool) -> dict[str, Any]:
    """Version and column scales in the configuration of a newly packed model."""
    rounded = values in STORED
    return {"version": 3 if rounded else 2 if stacks else 1, "column_scales": rounded}


def _empty(size: tuple[int, ...], count: int, dtype: torch.dtype, config: PackedConfig, name: str) -> PackedWeight:
    """The parts of a packed weight of this shape on the meta device.

    Raises:
        CheckpointError: there are more values than weights.
    """
    rows, columns = math.prod(size[:-1]), size[-1]
    if count > rows * columns:
        raise CheckpointError(
            f"config.json says {count} values in '{name}', which has {rows} × {columns} weights: download "
            "or pack the model again"
        )
    kind = STORED.get(config.values)
    groups = -(-columns // config.group_size) if config.group_size else 1
    with torch.device("meta"):
        return PackedWeight(
            torch.empty(count, dtype=kind or dtype),
            torch.empty(rows, -(-columns // 8), dtype=torch.uint8),
            torch.empty(rows, dtype=torch.int64),
            size,
            torch.empty(rows, groups, dtype=torch.float32) if kind else None,
            config.group_size if kind else 0,
            torch.empty(math.prod(size[:-2]), columns, dtype=dtype) if kind and config.column_scales else None,
        )


def _flat_count(model: nn.Module, name: str) -> int:
    """Number of matrices that are concatenated in the parameter. Raises CheckpointError if it has none."""
    owner, _, leaf = name.rpartition(".")
    count, _ = flat_stacks(model.get_submodule(owner)).get(leaf, (0, False))
    if count < 1:
        raise CheckpointError(f"config.json says that '{name}' holds the matrices of experts, which it does not")
    return count


def _find(model: nn.Module, path: str, flat: bool) -> tuple[str, Any] | None:
    """The linear layer or stacked parameter at ``path``, also if one of both has the prefix of a head's backbone.

    Raises:
        CheckpointError: another kind of module is there.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (path, path.removeprefix(prefix), prefix + path):
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        found: Any = module._modules.get(leaf)
        if found is None:
            found = module._parameters.get(leaf)
        if found is None:
            continue
        if not (found.dim() == (2 if flat else 3) if isinstance(found, nn.Parameter) else is_linear(found)):
            raise CheckpointError(f"config.json says that '{name}' is packed, which is a {type(found).__name__}")
        return name, found
    return None
