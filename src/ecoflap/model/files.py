"""Finds and checks a checkpoint's files before anything is loaded: a local folder, a GGUF file or a hub id."""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from ecoflap.errors import CheckpointError
from ecoflap.support.reading import NO_READING, checked, json_value, read_text, reason_of
from ecoflap.support.text import first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED, BITMASK = "ecoflap", "sparse-bitmask"  # quantisations whose weights can be unpacked
# Eight- and four-bit floats with scales, by transformers' class that can convert them to plain weights.
FLOATS = {"fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
OPEN_CLIP, OPEN_CLIP_CONFIG = (
    "open_clip:",
    "open_clip_config.json",
)  # prefix of its models, and the file in their folders
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_SECONDS = 10.0  # after which the hub counts as unreachable


@dataclass(frozen=True)
class Files:
    """A checkpoint on the local disk with complete weight files."""

    folder: Path
    config: dict[str, Any]  # config.json; empty for GGUF, which has its configuration in its header
    gguf_file: str | None = None
    shards: tuple[Path, ...] = ()


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in ``folder``; 0 if there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def locate(source: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Files:
    """Find and check the files of ``source``; a hub id is downloaded into the hub's cache first.

    Raises:
        CheckpointError: nothing is there, or no readable weights, or a broken file; one line with what to do.
    """
    if is_open_clip(source):
        raise CheckpointError(f"'{source}' is a model of open_clip: it can be pruned, but not packed")
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, gguf_file)
    if not path.is_dir():
        if isinstance(source, Path) or _means_path(str(source)):
            raise CheckpointError(f"no model folder '{source}'{_near(path)}")
        path = _download(str(source), gguf_file, trust_remote_code)
    return _from_folder(path, gguf_file)


def check_place(source: str | Path) -> None:
    """Check that a model exists, here or on the Hub, without a download. Raises CheckpointError as :func:`locate`."""
    if is_open_clip(source):
        name = str(source).removeprefix(OPEN_CLIP)
        if name.startswith((".", "/", "~")) and not (Path(name).expanduser() / OPEN_CLIP_CONFIG).is_file():
            raise CheckpointError(f"no model of open_clip in '{name}': its folder would hold {OPEN_CLIP_CONFIG}")
        return
    path = Path(source).expanduser()
    if path.exists() or isinstance(source, Path) or _means_path(str(source)):
        locate(source)
    else:
        _on_hub(str(source), None)


def is_open_clip(source: str | Path | None) -> bool:
    """Whether a model is given by ``open_clip:``, or is a folder in open_clip's format and in no other."""
    if source is None:
        return False
    if str(source).startswith(OPEN_CLIP):
        return True
    folder = Path(source).expanduser()
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return False
    return not (folder / "config.json").is_file() or read_config(folder).get("model_type") == "open_clip"


def _means_path(name: str) -> bool:
    """Whether a name must be a mistyped path, not a hub id, so that the hub is not asked."""
    if name.startswith((".", "/", "~")) or name.endswith((".gguf", ".safetensors")):
        return True
    first = name.split("/")[0]
    return not _HUB_ID.fullmatch(name) or ("/" in name and Path(first).is_dir())


def _near(path: Path) -> str:
    """A hint with the most similar name beside ``path``."""
    parent = path.parent
    if not parent.is_dir():
        return f": '{parent}' does not exist either; give a folder, a .gguf file or a hub id"
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f": did you mean '{parent / near[0]}'?" if near else ": give a folder, a .gguf file or a hub id"


def _from_file(path: Path, gguf_file: str | None) -> Files:
    if path.suffix == ".gguf" and gguf_file in (None, path.name):
        return _gguf(path)
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"'{path}' is a pickled file, which can run code when opened and is not read: "
            "save the model as safetensors and give its folder"
        )
    raise CheckpointError(f"'{path}' is a file: give the folder that holds it with its config.json, or a .gguf file")


def _gguf(path: Path) -> Files:
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.gguf"))
        raise CheckpointError(
            f"no GGUF file '{path.name}' in '{path.parent}': "
            + (f"choose from {', '.join(found)}" if found else "it holds none")
        )
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"'{path}' is not a GGUF file or is broken: download or copy it again")
    return Files(path.parent, {}, path.name)


def _from_folder(folder: Path, gguf_file: str | None) -> Files:
    if gguf_file is not None:
        return _gguf(folder / gguf_file)
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        if not ((entry := folder / name).is_file() or entry.is_dir()) and entry.exists():
            raise CheckpointError(f"'{entry}' is no file: a pipe or device could be read for ever; remove it")
    if not (folder / "config.json").is_file():
        return _without_config(folder, names)
    config = read_config(folder)
    if method := quantisation(config):
        if method in (PACKED, BITMASK) or method in FLOATS:
            return Files(folder, config, None, _shards(folder, names, config))
        raise CheckpointError(
            f"the weights in '{folder}' are quantised ({method}), so there are no single weights to prune: "
            "give the unquantised checkpoint"
        )
    return Files(folder, config, None, _shards(folder, names, config))


class _Fields(BaseModel):
    """The fields of a configuration that are read here."""

    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder.

    Raises:
        CheckpointError: it can't be read, is no JSON object, or has a field of the wrong type.
    """
    path = folder / "config.json"
    config: Any = _json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' is not a model configuration: it holds no JSON object")
    checked(config, _Fields, f"'{path}' is not a model configuration", CheckpointError)
    return config


def safetensors_of(folder: Path) -> tuple[Path, ...]:
    """The weight files of a model folder. Raises CheckpointError if one is missing or damaged."""
    return _shards(folder, sorted(entry.name for entry in folder.iterdir()), {})


def quantisation(config: dict[str, Any]) -> str | None:
    """The method in ``config.json``: PACKED for ours, BITMASK for old sparse checkpoints, None for plain weights."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found and isinstance(config.get("sparsity_config"), dict):
        found = {"sparsity_config": config["sparsity_config"]}
    if not found:
        return None
    sparsity = found.get("sparsity_config")
    plain = not found.get("config_groups")  # whatever the status: what is quantised has a scheme there
    formats = (found.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None)
    if plain and BITMASK in formats:
        return BITMASK
    return str(found.get("quant_method", "some method"))


def _without_config(folder: Path, names: list[str]) -> Files:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _gguf(folder / ggufs[0])
    if ggufs:
        raise CheckpointError(f"'{folder}' holds {len(ggufs)} GGUF files ({', '.join(ggufs)}): give the path of one")
    if "adapter_config.json" in names:
        raise CheckpointError(f"'{folder}' holds an adapter: merge it into its base model and save that first")
    below = [entry for entry in names if (folder / entry / "config.json").is_file()]
    hint = f"did you mean '{folder / below[0]}'?" if below else "give a folder made by save_pretrained"
    raise CheckpointError(f"'{folder}' is no model folder, it has no config.json: {hint}")


def _shards(folder: Path, names: list[str], config: dict[str, Any]) -> tuple[Path, ...]:
    """The safetensors files of a folder, each checked."""
    if WEIGHTS in names:
        shards: list[Path] = [folder / WEIGHTS]
    elif INDEX in names:
        index = _json(folder / INDEX)
        try:
            shards = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"'{folder / INDEX}' has no weight_map: download or copy it again") from None
        if outside := [shard.name for shard in shards if shard.parent != folder]:
            raise CheckpointError(f"'{folder / INDEX}' names files outside its folder ({outside[0]}): not read")
    else:
        raise _no_weights(folder, names, config)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"'{folder}' is incomplete: {shard.name} is missing; download or copy it again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"'{shard}' is broken or incomplete ({first_line(error)}): download or copy it again"
            ) from error
    return tuple(shards)


def _no_weights(folder: Path, names: list[str], config: dict[str, Any]) -> CheckpointError:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        model_class = (config.get("architectures") or ["AutoModel"])[0]
        return CheckpointError(
            f"'{folder}' holds only pickled weights ({pickled[0]}), which can run code when opened and are not read: "
            f'convert them once where you trust them, with python -c "from transformers import {model_class} as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", and give that folder"
        )
    return CheckpointError(f"'{folder}' has a config.json but no weights: {WEIGHTS} or {INDEX} is needed")


def _download(name: str, gguf_file: str | None, trust_remote_code: bool) -> Path:
    """The local snapshot of a hub repository: its configuration files, safetensors and nothing else."""
    import huggingface_hub

    found = _on_hub(name, gguf_file)
    if isinstance(found, Path):
        return found
    try:
        wanted = hub_files(found, gguf_file, trust_remote_code)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(
            f"the download of '{name}' failed ({first_line(error)}): run again to resume it"
        ) from error


def _on_hub(name: str, gguf_file: str | None) -> list[str] | Path:
    """The names of a hub repository's files, by one short request; if the hub does not answer, its snapshot here."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    near = _near(Path(name))
    local = near if "did you mean" in near else "; it is no local folder either"
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise CheckpointError(
            f"the hub model '{name}' asks for consent: accept it on its page and log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub knows no model '{name}' (or it is private: log in with hf auth login){local}"
        ) from error
    except Exception as error:  # whatever the HTTP client in use raises: no network, offline mode, a server error
        try:
            # Not snapshot_download: it refuses a snapshot that lacks files which ecoflap never downloads.
            known = gguf_file or "config.json"
            found = Path(huggingface_hub.hf_hub_download(name, known, local_files_only=True))
            return found.parents[known.count("/")]
        except OSError:
            raise CheckpointError(
                f"the hub cannot be reached for '{name}' and its cache does not hold it{local}"
            ) from error
    return [entry.rfilename for entry in info.siblings or []]


def hub_files(names: list[str], gguf_file: str | None, trust_remote_code: bool) -> list[str]:
    """The files of a repository to download: card, top-level configuration and tokenizer files, one set of weights.

    Weights are the requested GGUF file, else ``model.safetensors``, else the shards of its index, else the only GGUF
    file. Code is left out unless it is trusted, pickled files always.
    """
    suffixes = (".json", ".txt", ".model", ".jinja", *((".py",) if trust_remote_code else ()))
    top = [name for name in names if "/" not in name]
    wanted = [name for name in top if name.endswith(suffixes) or name == "README.md"]  # it names the licence
    ggufs = [name for name in names if name.endswith(".gguf")]
    if gguf_file is not None:
        return [*wanted, gguf_file]
    if WEIGHTS in top:
        return [name for name in wanted if name != INDEX] + [WEIGHTS]
    if INDEX in top:
        return wanted + [name for name in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    return wanted + (ggufs if len(ggufs) == 1 else [])


def _json(path: Path) -> Any:
    try:
        return json_value(read_text(path), finite=False)
    except NO_READING as error:
        why = reason_of(error, "JSON")
        raise CheckpointError(f"'{path}' cannot be read ({why}): download or copy it again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers and the hub show no progress bars and reports."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        accelerate.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
