"""Packs the checkpoint folder of a pruned model, and unpacks it to the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ecoflap.errors import CheckpointError
from ecoflap.model.checkpoint import DTYPES, empty_model, load
from ecoflap.model.files import BITMASK, INDEX, PACKED, locate, quantisation, read_config
from ecoflap.model.packed.card import write_packed_card, write_plain_card
from ecoflap.model.packed.convert import PackedModel, pack
from ecoflap.model.packed.format import checked_group_size
from ecoflap.model.packed.reading import PACKED_KEYS, Unpacking, plain_files
from ecoflap.model.packed.shards import names_in_files, pack_shards, too_large
from ecoflap.model.replace import check_apart, check_replaceable
from ecoflap.model.save import replacing, write_model
from ecoflap.support.files import default_mode, storage


@dataclass(frozen=True)
class PackedFolder:
    """The result of :func:`pack_checkpoint`: ``folder``, and bytes of the weight files before and after."""

    folder: Path
    model: PackedModel
    files_before: int
    files_after: int


def pack_checkpoint(
    source: str | Path | None,
    output: str | Path,
    *,
    values: str = "auto",
    group_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> PackedFolder:
    """Write the checkpoint ``source`` packed into ``output``, with its processor and its card.

    Args:
        source: as for :func:`ecoflap.load`. A model that would fill the memory is packed file by file.
        values, group_size: as for :func:`ecoflap.pack`.

    Raises:
        EcoflapError: as :func:`ecoflap.load`, :func:`ecoflap.pack` and :func:`ecoflap.save`.
    """
    size = checked_group_size(values, group_size)
    check_apart(source, output)
    with storage(Path(output)):
        check_replaceable(Path(output).expanduser(), overwrite=overwrite)  # before anything is loaded
    files = None if source is None else locate(source, trust_remote_code=trust_remote_code)
    if files is not None and quantisation(files.config) == PACKED:
        raise CheckpointError(f"'{source}' is packed already: 'ecoflap unpack' writes the plain checkpoint")
    if files is not None and too_large(files):
        if quantisation(files.config) == BITMASK:
            raise CheckpointError(f"'{source}' would fill the memory: unpack it first, with 'ecoflap unpack'")
        told = pack_shards(files, output, values, size, overwrite=overwrite, trust_remote_code=trust_remote_code)
        before = sum(shard.stat().st_size for shard in files.shards)
    else:
        found = load(source, device="cpu", trust_remote_code=trust_remote_code)
        told, before = pack(found.model, values=values, group_size=size), sum(found.shard_sizes)
        with replacing(output, overwrite=overwrite) as partial:
            write_model(found, partial)
            if source is not None:
                write_packed_card(Path(source).expanduser(), partial)
    folder = Path(output).expanduser().absolute()
    return PackedFolder(folder, told, before, sum(file.stat().st_size for file in _weights(folder)))


def unpack_checkpoint(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the plain checkpoint of a packed one: ours, or a ``sparse-bitmask`` one of compressed-tensors.

    Works file by file; tensors that are not packed are copied. Stacked experts get the names under which transformers
    saves them, which for many families are one per expert. Unrounded values are restored to the bit; rounded values
    are dequantised, in the dtype of the configuration.

    Raises:
        CheckpointError: it is not packed, or damaged.
        OutputExists, StorageError: as :func:`ecoflap.save`.
    """
    source = Path(source).expanduser()
    if not (source / "config.json").is_file():
        raise CheckpointError(f"'{source}' is no model folder, it has no config.json: give a packed model's folder")
    config = read_config(source)
    method = quantisation(config)
    if method not in (PACKED, BITMASK):
        raise CheckpointError(f"'{source}' is not packed ({method or 'plain weights'}): there is nothing to unpack")
    check_apart(source, output)
    with replacing(output, overwrite=overwrite) as folder:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, folder / file.name)
        _write_weights(source, folder, _unpacking(config, source), method == PACKED)
        plain = {key: value for key, value in config.items() if key not in PACKED_KEYS}
        (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", "utf-8")
        write_plain_card(source, folder)
        for file in folder.iterdir():
            file.chmod(default_mode())
    return Path(output)


def _unpacking(config: dict[str, Any], folder: Path) -> Unpacking:
    ours = config.get("quantization_config") or {}
    size, turned, flat = ours.get("group_size", 0), ours.get("transposed", []), ours.get("flat", [])
    if not (isinstance(size, int) and isinstance(turned, list) and isinstance(flat, list)):
        raise CheckpointError(f"the quantization_config of '{folder}' is damaged: download or pack the model again")
    dtype = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    return Unpacking(dtype, size, tuple(str(name) for name in turned), tuple(str(name) for name in flat))


def _write_weights(source: Path, folder: Path, unpacking: Unpacking, ours: bool) -> None:
    model: nn.Module | None = None

    def names_of_stack(name: str, weight: Tensor) -> dict[str, Tensor]:
        nonlocal model
        model = model or empty_model(locate(source))
        return names_in_files(model, {name: weight})

    index: dict[str, str] = {}
    total = 0
    for file, tensors in plain_files(source, unpacking, names_of_stack if ours else None):
        total += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(tensors, file.name)
        save_file(tensors, folder / file.name, {"format": "pt"})
    if (source / INDEX).is_file():
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
