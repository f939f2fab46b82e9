"""Decides which folders ``--overwrite`` may replace by a model: those that contain only a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ecoflap.errors import EcoflapError, InvalidOption, OutputExists
from ecoflap.model.files import INDEX, WEIGHTS
from ecoflap.support.files import check_can_make
from ecoflap.support.reading import read_json

# Files of a model and its processor, code that comes with a checkpoint, and texts about it.
_FILES = (
    WEIGHTS, INDEX, "model-*-of-*.safetensors", "*config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "normalizer.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*.jinja", "modeling_*.py", "configuration_*.py", "processing_*.py", "tokenization_*.py",
    "image_processing_*.py", "README.md", "README.base.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_SHOWN = 3  # files that a message names


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Check that a model may be written to ``folder``.

    Raises:
        OutputExists: it is a file; or it is not empty, and ``overwrite`` is false or it contains more than a model.
        StorageError: nothing can be written there.
    """
    check_can_make(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.is_file() else "no folder"  # a device, a pipe, a link to nothing
        raise OutputExists(f"'{folder}' is {kind}: choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputExists(f"'{folder}' already holds something: choose another folder or overwrite it")
    foreign = list(_foreign(folder))
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise OutputExists(
            f"'{folder}' holds files that are no part of a model ({', '.join(foreign[:_SHOWN])}{more}) and would be "
            "lost: choose another folder, or move them away"
        )


def _foreign(folder: Path) -> Iterator[str]:
    """Files under ``folder`` that no checkpoint has."""
    try:
        index = read_json(folder / INDEX, "the index") if (folder / INDEX).is_file() else {}
        shards = set(index["weight_map"].values()) if index else set()
    except (EcoflapError, LookupError, TypeError, AttributeError):
        shards = set()  # its files are then foreign
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name not in shards and not any(fnmatchcase(name, pattern) for pattern in _FILES):
            yield name


def check_apart(source: str | Path | None, output: str | Path) -> None:
    """Raises InvalidOption if ``output`` is the folder ``source``, in it or around it: it would be lost."""
    if source is None or not Path(source).expanduser().exists():
        return
    # not resolve(), which raises RuntimeError for loops of links
    there, here = (Path(os.path.realpath(Path(place).expanduser())) for place in (source, output))
    if there == here or there in here.parents or here in there.parents:
        raise InvalidOption(f"the output '{output}' is, holds or lies in the model '{source}': choose another folder")
