"""Reads the packed weights of a checkpoint folder as dense ones, weight file after weight file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecoflap.errors import CheckpointError
from ecoflap.model.files import safetensors_of
from ecoflap.model.packed.checks import from_tensors
from ecoflap.model.packed.format import PARTS, unpack_weight
from ecoflap.model.packed.stack import SUFFIX, as_stored
from ecoflap.support.text import first_line

PACKED_KEYS = ("quantization_config", "compression_config", "sparsity_config")  # of config.json: they say it is packed


@dataclass(frozen=True)
class Unpacking:
    """How the packed weights of a folder are read, as its configuration says; by default those of compressed-tensors.

    Attributes:
        dtype: of the dense weights, where values are rounded.
        group_size, transposed, flat: as in ``quantization_config``.
    """

    dtype: torch.dtype = torch.float32
    group_size: int = 0
    transposed: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()

    def weight(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The dense weight of ``parts``, as the model stores it; raises CheckpointError where they disagree."""
        packed = from_tensors(parts, name, self.group_size)
        dense = unpack_weight(packed, self.dtype if packed.scales is not None else None)
        layer = name.removesuffix(".weight")
        turned, flat = (
            any(layer == path or layer.endswith(f".{path}") or path.endswith(f".{layer}") for path in paths)
            for paths in (self.transposed, self.flat)
        )
        return as_stored(dense, turned, flat and dense.dim() == 3)


def plain_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a ``sparse-bitmask`` folder of compressed-tensors, dense, by their names in its files.

    Raises:
        CheckpointError: a file or a packed weight is damaged.
    """
    found: dict[str, Tensor] = {}
    for _, tensors in plain_files(folder, Unpacking()):
        found |= tensors
    return found


def plain_files(
    folder: Path, unpacking: Unpacking, names_of_stack: Callable[[str, Tensor], dict[str, Tensor]] | None = None
) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Each weight file of ``folder`` with its tensors by their names; packed ones are dense.

    Args:
        names_of_stack: gives what stacked experts become in plain files; None: they are stored as they are.

    Raises:
        CheckpointError: a file or a packed weight is damaged.
    """
    files = safetensors_of(folder)
    places: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        packed = _packed_names(places)
        inside = {part for parts in packed.values() for part in parts.values()}
        for file in files:
            tensors: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    if name not in inside:
                        tensors[name] = opened.get_tensor(name)
            for name, parts in packed.items():
                if places[parts["compressed"]] == file:
                    weight = unpacking.weight(name, {part: _tensor(places, key) for part, key in parts.items()})
                    stacked = parts["compressed"].endswith(f"{SUFFIX}.compressed")
                    named = names_of_stack(name, weight) if names_of_stack and stacked else {name: weight}
                    tensors |= named
            yield file, tensors
    except SafetensorError as error:
        raise CheckpointError(f"a weight file of '{folder}' can't be read ({first_line(error)})") from error


def _packed_names(places: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Name of each packed weight to its parts' names. Older files name the parts after the weight, ours the layer."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in places:
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            groups[layer][part] = name
    whole = {layer: parts for layer, parts in groups.items() if {"compressed", "bitmask"} <= set(parts)}
    return {_weight_name(layer): parts for layer, parts in whole.items()}


def _weight_name(layer: str) -> str:
    if layer.endswith(SUFFIX):
        return layer.removesuffix(SUFFIX)
    return layer if layer.endswith(".weight") else f"{layer}.weight"


def _tensor(places: dict[str, Path], name: str) -> Tensor:
    with safe_open(places[name], framework="pt") as opened:
        found: Tensor = opened.get_tensor(name)
    return found
