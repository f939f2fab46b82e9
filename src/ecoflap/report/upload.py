"""Chooses the files of an upload: those of one complete model, without files elsewhere or private ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ecoflap.errors import InvalidOption
from ecoflap.model.files import read_config, safetensors_of
from ecoflap.report.card import MODEL, write_card
from ecoflap.report.card_page import README
from ecoflap.report.data import METRICS, RECIPE
from ecoflap.run.compare.folder import MODELS
from ecoflap.run.names import is_compare

CONFIG = "config.json"
# The files of a checkpoint: weights, configurations, vocabularies, templates, code and texts.
_KINDS = (
    ".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".py", ".vocab", ".bpe", ".spm", ".tiktoken", ".merges",
)  # fmt: skip
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_SHOWN = 5  # files that a warning names


def model_folder(run: Path) -> Path:
    """The model folder of a finished run, with its card; ``run`` itself if it is a model's folder.

    Raises:
        InvalidOption: it is neither, or a comparison, or the run is not finished, or its model is outside of the run.
        CheckpointError: the model's files are not complete.
    """
    if (run / CONFIG).is_file():
        return _whole(run)
    if not (run / RECIPE).is_file():
        raise InvalidOption(f"{run} is neither a run directory nor a folder with a model: give one")
    if is_compare(run) or (run / MODELS).is_dir():
        kept = f"{run / MODELS}/NAME, one of its models" if (run / MODELS).is_dir() else "a run (--keep-models)"
        raise InvalidOption(f"{run} is a comparison, which has no model of its own: give {kept}")
    if not ((run / METRICS).is_file() and (run / MODEL / CONFIG).is_file()):
        raise InvalidOption(f"{run} is not finished: the command that began it, with --resume, goes on with it")
    if not _inside(run / MODEL, run):
        raise InvalidOption(f"{run / MODEL} is a link to a folder outside of the run: give that folder itself")
    folder = _whole(run / MODEL)
    if not (folder / README).is_file():
        write_card(run)  # for a run of an earlier version
    return folder


def _whole(folder: Path) -> Path:
    """Return ``folder`` if it has a model's configuration and all weights."""
    config = read_config(folder)
    if not (config.get("model_type") or config.get("architectures")):
        raise InvalidOption(f"{folder / CONFIG} is not a model's configuration: give a run directory or a model")
    safetensors_of(folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    """The files of a model to send, sorted: without hidden files and files that are no part of a checkpoint.

    Warns of files that are left out.

    Raises:
        InvalidOption: a link leads out of the folder or nowhere, or a file contains a path of this machine.
    """
    found: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        if path.is_symlink() and not (_inside(path, folder) and path.exists()):
            raise InvalidOption(
                f"{path} is a link to a place outside of the model's folder, or to nothing: put the file itself there, "
                "or remove the link; nothing was uploaded"
            )
        if path.is_file():
            known = path.suffix.lower() in _KINDS or path.stem.upper() in _NAMES
            (found if known else left).append(path)
        elif not path.is_dir():
            left.append(path)  # a broken link, a pipe
    if left:
        names = [path.relative_to(folder).as_posix() for path in left]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(f"{', '.join(names[:_SHOWN])}{more}: no part of a checkpoint, and not uploaded", stacklevel=3)
    for path in found:
        if path.suffix.lower() == ".md" or path.name.endswith("config.json"):
            content = path.read_bytes()
            for place in _own_places(folder):
                if place.encode() in content:
                    raise InvalidOption(
                        f"{path} names a folder of this machine ({place}): take it out, then push again; nothing was "
                        "uploaded"
                    )
    return found


def _inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is in ``folder`` after following links; unlike resolve(), accepts loops of links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _own_places(folder: Path) -> Iterator[str]:
    """Folders of this machine that are private: the home, and that of the model."""
    home, above = Path.home(), folder.absolute().parent
    for place in (home, above):
        if len(place.parts) > 2:  # "/root" and "/tmp" may be in any text
            yield f"{place}/"
