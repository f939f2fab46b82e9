"""Loads a model with its processor: the embedded VLM, a folder, a GGUF file or a hub id, always as its own class."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ecoflap.errors import CheckpointError, EcoflapError, InvalidOption, MissingDependency
from ecoflap.model.device_map import dispatching
from ecoflap.model.files import BITMASK, FLOATS, Files, is_open_clip, locate, quantisation, quiet
from ecoflap.model.gguf_metadata import parsed_once
from ecoflap.model.open_clip import load_open_clip
from ecoflap.model.packed.reading import PACKED_KEYS, plain_weights
from ecoflap.model.processor import load_processor
from ecoflap.support.text import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_FALLBACKS = (  # tried in this order if config.json names no class
    "AutoModelForImageTextToText",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, with all that is needed to save it in the form of its source.

    ``processor`` is the processor, tokenizer or image processor, or None; ``dtype`` that of most weights;
    ``shard_sizes`` the bytes of each weight file of the source (empty for GGUF); ``warnings`` have one line each.
    """

    model: PreTrainedModel
    processor: Any | None
    source: str
    dtype: torch.dtype
    shard_sizes: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


def load(
    source: str | Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    device_map: str | None = None,
    max_memory: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Load a checkpoint in evaluation mode, as the class that its configuration names (so its heads are kept).

    Args:
        source: a folder with config.json and safetensors, a .gguf file or a folder with one, a hub id, or None for
            the embedded VLM.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (a GPU if there is one) or a torch device.
        trust_remote_code: run model code that comes with the checkpoint; only for sources that you trust.
        gguf_file: which GGUF file of the folder or hub repository to read.
        device_map: for a model larger than the memory: "disk" leaves the weights in their files and reads those of a
            module while it runs; "auto", "balanced", "balanced_low_0" or "sequential" fill the GPUs, then the memory of
            the computer, then the disk. Weights on the disk are loaded to ``device`` when they are used.
        max_memory: memory that such a map may use, by device: "0" (a GPU's number) or "cpu", such as "20GiB".

    Raises:
        CheckpointError: missing, broken, pickled only, quantised, of an unknown class, or with weights missing.
        InvalidOption: unknown dtype or unusable device or device map.
        MissingDependency: a GGUF file without the packages that read it.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidOption(f"dtype '{dtype}' is not one of auto, {', '.join(DTYPES)}")
    place = _device(device)
    name = "embedded VLM" if source is None else str(source)
    if source is not None and is_open_clip(source):
        return _open_clip(source, dtype, place, device_map)
    files = locate(_embedded() if source is None else source, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if files.gguf_file is not None:
        _require_gguf()
        if device_map is not None:
            raise InvalidOption(f"a GGUF file is unpacked in memory: leave out device_map {device_map}")
    if (form := _unpacked(files)) and device_map is not None:
        raise InvalidOption(f"{form} weights are unpacked in memory: leave out device_map {device_map}")
    once = nullcontext() if files.gguf_file is None else parsed_once()
    with quiet(), once, dispatching(device_map, max_memory) as dispatch:
        model_class = _model_class(files, trust_remote_code)
        model, warnings = _load_model(files, model_class, name, dtype, trust_remote_code, dispatch.options)
        model = dispatch.finish(model, place)
        processor, failed = load_processor(files, trust_remote_code)
    for line in (lines := [*warnings, *failed]):
        _log.warning(line)
    sizes = tuple(shard.stat().st_size for shard in files.shards)
    return Checkpoint(model.eval(), processor, name, model_dtype(model), sizes, tuple(lines))


def _open_clip(source: str | Path, dtype: str, place: torch.device, device_map: str | None) -> Checkpoint:
    if device_map is not None:
        raise InvalidOption(f"a model of open_clip is loaded into memory: leave out device_map {device_map}")
    with quiet():
        model, processor, told = load_open_clip(source, DTYPES.get(dtype))
    for line in told:
        _log.warning(line)
    return Checkpoint(model.to(place), processor, str(source), model_dtype(model), (), tuple(told))


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The floating dtype of most weights; ``model.dtype`` is that of the first one, which may be kept in fp32."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda kind: counts[kind], default=torch.get_default_dtype())


def _embedded() -> Path:
    from ecoflap.support import embedded

    return Path(embedded.model_path())


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidOption(f"device '{device}' cannot be used ({first_line(error)}): try cpu, cuda or auto") from error
    return place


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("a GGUF file needs gguf: pip install 'ecoflap[gguf]'")


def _model_class(files: Files, trust_remote_code: bool) -> Any:
    """The class of transformers that the configuration names, else the first Auto class that knows its type."""
    config = files.config
    for name in config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        # Only a model's own class: an Auto class would look for code that comes with the checkpoint.
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if "auto_map" in config and not trust_remote_code:
        raise CheckpointError(
            f"the model in '{files.folder}' needs code that comes with it: read that code, "
            "then allow it with trust_remote_code"
        )
    if config.get("auto_map") and trust_remote_code:
        names = [name for name in config["auto_map"] if name.startswith("AutoModel")]
        return getattr(transformers, names[0] if names else "AutoModel")
    return _auto_class(files)


def empty_model(files: Files, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model in ``files`` on the meta device.

    Raises:
        CheckpointError: its class is unknown, or refuses its configuration.
    """
    kind = _model_class(files, trust_remote_code)
    try:
        config = transformers.AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"), quiet():
            model: torch.nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except Exception as error:  # transformers raises many kinds for a bad configuration
        raise CheckpointError(f"'{files.folder}' cannot be built as {kind.__name__}: {first_line(error)}") from error
    return model


def _auto_class(files: Files) -> Any:
    config, where = files.config, f"'{files.folder / (files.gguf_file or '')}'"
    try:
        options = {"gguf_file": files.gguf_file} if files.gguf_file else {}
        kind = transformers.AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # unknown type, invalid values, unreadable header: transformers raises many kinds
        named = config.get("architectures") or config.get("model_type") or "none"
        raise CheckpointError(
            f"{where} names no model class that transformers {transformers.__version__} knows "
            f"({named}): {first_line(error)}"
        ) from error
    for name in _FALLBACKS:
        auto = getattr(transformers, name, None)
        if auto is not None and type(kind) in auto._model_mapping:
            return auto
    raise CheckpointError(
        f"transformers {transformers.__version__} has no model for type '{kind.model_type}' of {where}"
    )


def _load_model(
    files: Files, model_class: Any, name: str, dtype: str, trust_remote_code: bool, spread: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    # Always given: without a value, transformers asks on the terminal.
    options: dict[str, Any] = {**spread, "trust_remote_code": trust_remote_code}
    place: Path | None = files.folder
    form = _unpacked(files)
    bars: AbstractContextManager[object] = nullcontext()
    if files.gguf_file is not None:
        bars = redirect_stderr(io.StringIO())  # the GGUF reader draws a bar that no setting of transformers disables
        options["gguf_file"] = files.gguf_file
        if hasattr(transformers, "GgufConfig"):  # plain weights, not packed ones
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    if form in FLOATS:
        options["quantization_config"] = getattr(transformers, FLOATS[form])(dequantize=True)
    if form == BITMASK:  # compressed-tensors no longer reads it
        place, options = None, {**options, **_unpacked_in_memory(files, trust_remote_code)}
    try:
        with bars:
            model, info = model_class.from_pretrained(
                place,
                dtype=DTYPES.get(dtype, "auto"),
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, with names
                output_loading_info=True,
                **options,
            )
    except (EcoflapError, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a bad checkpoint
        raise CheckpointError(f"'{name}' cannot be loaded as {model_class.__name__}: {first_line(error)}") from error
    if place is None:
        _as_from(model, files.folder)
    if files.gguf_file is not None or form in FLOATS:
        # The weights are plain now; with their old quantisation config the model could not be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if form in FLOATS:
        vars(model).pop("_weight_conversions", None)  # saving would quantise them again
    told = [f"'{name}' is stored in {form}: unpacked to {_short(model)}, pruned and saved so"] if form else []
    return model, told + _review(info, name, type(model).__name__)


def _unpacked(files: Files) -> str:
    """The format of weights that are unpacked while they are loaded, small floats or BITMASK; "" for any other."""
    method = quantisation(files.config) if files.gguf_file is None else None
    return method if method is not None and (method in FLOATS or method == BITMASK) else ""


def _unpacked_in_memory(files: Files, trust_remote_code: bool) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a ``sparse-bitmask`` folder: its plain configuration and its dense weights.

    Raises:
        CheckpointError: either is damaged.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for a bad configuration
        raise CheckpointError(f"the configuration in '{files.folder}' can't be used: {first_line(error)}") from error
    for key in PACKED_KEYS:
        vars(config).pop(key, None)
    return {"config": config, "state_dict": plain_weights(files.folder)}


def _as_from(model: PreTrainedModel, folder: Path) -> None:
    """What ``from_pretrained`` does only with a folder: the model's name, and how it generates."""
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def _short(model: torch.nn.Module) -> str:
    return str(model_dtype(model)).removeprefix("torch.")


def _review(info: dict[str, Any], name: str, model_class: str) -> list[str]:
    """Lines about weights that did not match; missing ones and wrong shapes are errors, as they would be random."""
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"'{name}' does not fit its configuration: {key} is {tuple(stored)} in the file and {tuple(expected)} in "
            f"{model_class} ({len(info['mismatched_keys'])} such weights)"
        )
    missing = sorted(info["missing_keys"])
    needed = [key for key in missing if not re.search(r"(^|\.)pooler\.", key)]
    if needed:
        raise CheckpointError(
            f"'{name}' lacks {len(needed)} weights of {model_class} ({_some(needed)}): they would be random; "
            "the checkpoint is incomplete or of another class"
        )
    lines = []
    if missing:
        lines.append(
            f"'{name}' has no weights for {_some(missing)}: left at random, harmless unless the loss uses them"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        lines.append(
            f"'{name}' holds {len(unexpected)} weights that {model_class} does not use ({_some(unexpected)}): left out"
        )
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
