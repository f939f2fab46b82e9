"""Packs a checkpoint that is larger than the memory: weight file after weight file, without loading the model."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ecoflap.errors import CheckpointError
from ecoflap.model.checkpoint import empty_model
from ecoflap.model.files import INDEX, Files
from ecoflap.model.packed.card import write_packed_card
from ecoflap.model.packed.convert import PackedModel, Packing, packable, stackable
from ecoflap.model.packed.format import worth_packing
from ecoflap.model.packed.merging import Merge, merges
from ecoflap.model.packed.quantizer import PackedConfig, versioned
from ecoflap.model.packed.stack import SUFFIX, as_packed
from ecoflap.model.save import replacing
from ecoflap.support.files import default_mode
from ecoflap.support.text import first_line

_ROOM = 0.7  # share of the free memory; larger models are packed file by file


def too_large(files: Files) -> bool:
    """Whether the weights of ``files`` would fill the memory."""
    free: int = psutil.virtual_memory().available
    return sum(shard.stat().st_size for shard in files.shards) > _ROOM * free


@dataclass
class _Layers:
    """The weights that may be packed, by their names in the files: the model's name, and whether it is transposed.

    A layer's name is its path. Stacked experts have their parameter's name, which is also in ``stacks`` with the number
    of matrices if they are flat. Experts that the files hold one by one are in ``merges``, by the names of the pieces.
    """

    model: nn.Module
    places: dict[str, tuple[str, bool]]
    stacks: dict[str, tuple[bool, int]]
    merges: dict[str, Merge]
    counts: dict[str, int] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)


def pack_shards(
    files: Files, folder: str | Path, values: str, group_size: int, *, overwrite: bool, trust_remote_code: bool
) -> PackedModel:
    """Write the checkpoint of ``files`` packed into ``folder``; only one weight file of the result is in memory.

    Raises:
        CheckpointError: its weights have other names in the files than in the model, or a file can't be read.
        InvalidOption: no weight has enough zeros.
        OutputExists, StorageError: as :func:`ecoflap.save`.
    """
    packing = Packing(values, group_size)
    layers = _layers(files, trust_remote_code)
    with replacing(folder, overwrite=overwrite) as partial:
        for file in files.folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, partial / file.name)
        _write_weights(files, partial, packing, layers)
        result = packing.result(f"'{files.folder}'")
        config = json.loads((files.folder / "config.json").read_text("utf-8"))
        made = PackedConfig(
            values=values, group_size=group_size, layers=layers.counts, transposed=layers.transposed, flat=layers.flat,
            **versioned(values, bool(layers.stacks.keys() & layers.counts.keys())),
        )  # fmt: skip
        config["quantization_config"] = made.to_dict()
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        write_packed_card(files.folder, partial)
        for file in partial.iterdir():
            file.chmod(default_mode())
    return result


def _layers(files: Files, trust_remote_code: bool) -> _Layers:
    """The weights that may be packed, from the model on the meta device.

    Raises:
        CheckpointError: weights have other names in the files than in the model.
    """
    model = empty_model(files, trust_remote_code)
    layers = {f"{path}.weight": (path, layer) for path, layer in packable(model)}
    stored = {
        id(weight): name
        for name, weight in names_in_files(model, {name: layer.weight for name, (_, layer) in layers.items()}).items()
    }
    named = {
        stored.get(id(layer.weight), name): (path, not isinstance(layer, nn.Linear))
        for name, (path, layer) in layers.items()
    }
    inside = set(_names(files))
    if missing := sorted(set(named) - inside):
        raise CheckpointError(
            f"'{files.folder}' is larger than the memory, and its files name weights otherwise than the model "
            f"({missing[0]}): pack it on a computer whose memory holds it"
        )
    stacks = {name: (turned, flat) for name, _, _, turned, flat in stackable(model)}
    whole = {name: (name, turned) for name, (turned, _) in stacks.items() if name in inside}
    apart = merges(model, stacks.keys() - inside, inside)
    if left := sorted(stacks.keys() - inside - {one.stack for one in apart}):
        warnings.warn(
            f"experts of '{files.folder}' stay dense: its files hold no '{left[0]}', and nothing that transformers "
            "makes it of; a computer whose memory holds the model packs them",
            stacklevel=2,
        )
    return _Layers(model, {**named, **whole}, stacks, {name: one for one in apart for name, _ in one.pieces})


def names_in_files(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names in files, which transformers changes for some families.

    Stacked experts may be split there into one weight per expert.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # another version of transformers
        return weights
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return found


def _names(files: Files) -> dict[str, Path]:
    """The file of each tensor, by name."""
    names: dict[str, Path] = {}
    for shard in files.shards:
        with _opened(shard) as opened:
            names |= dict.fromkeys(opened.keys(), shard)
    return names


def _write_weights(files: Files, folder: Path, packing: Packing, layers: _Layers) -> None:
    index: dict[str, str] = {}
    total = 0
    places = _names(files)
    merged: dict[str, bool] = {}  # for each stack in pieces, whether it is packed

    def read(name: str) -> Tensor:
        with _opened(places[name]) as opened:
            return _tensor(opened, places[name], name)

    for shard in files.shards:
        tensors: dict[str, Tensor] = {}
        for name in (one for one, place in places.items() if place == shard):
            if (merge := layers.merges.get(name)) is not None:
                if merge.stack not in merged:
                    whole = merge.read(read, layers.model)
                    merged[merge.stack] = worth_packing(whole)
                    if merged[merge.stack]:
                        tensors |= _packed(
                            packing, layers, merge.stack, merge.stack, whole, layers.stacks[merge.stack][0]
                        )
                if merged[merge.stack]:
                    continue
            tensor = read(name)
            if name in layers.places and worth_packing(tensor):
                tensors |= _packed(packing, layers, name, layers.places[name][0], tensor, layers.places[name][1])
            else:
                tensors[name] = tensor
                packing.other_bytes += tensor.nbytes
        total += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(tensors, shard.name)
        save_file(tensors, folder / shard.name, {"format": "pt"})
    if len(files.shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _packed(packing: Packing, layers: _Layers, name: str, path: str, tensor: Tensor, turned: bool) -> dict[str, Tensor]:
    """The parts of a packed weight by their names in the files."""
    _, flat = layers.stacks.get(path, (turned, 0))
    packed = packing.add(path, as_packed(tensor, turned, flat))
    layers.counts[path] = len(packed.compressed)
    layers.transposed += [path] if turned else []
    layers.flat += [path] if flat else []
    if path not in layers.stacks:
        return {f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.tensors().items()}
    return names_in_files(layers.model, {f"{name}{SUFFIX}.{part}": value for part, value in packed.tensors().items()})


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"'{shard}' can't be read ({first_line(error)}): download or copy it again") from error


def _tensor(opened: Any, shard: Path, name: str) -> Tensor:
    try:
        found: Tensor = opened.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"'{shard}' can't be read ({first_line(error)}): download or copy it again") from error
    return found
