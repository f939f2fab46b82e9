"""Formats recipes and environments as label and text, the command that repeats a run, and sizes on the disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ecoflap.model.files import weight_bytes
from ecoflap.report.data import RunData
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.finetune.upop_recipe import HIDDEN, UPop
from ecoflap.run.names import MODEL, PACKED, TRAIN
from ecoflap.run.recipe import FILE_ONLY, Recipe, flag_of, idle_fields

RECORDS = ("versions", "fingerprint", "format")  # entries of a recipe about its run, which are no options
_NOT_REPEATED = {*RECORDS, "model", "output", "overwrite", "resume", "quiet", "json", "recipe"}


def reproduce(recipe: Mapping[str, Any], output: str = "runs/again") -> str:
    """``ecoflap prune``, ``finetune`` or ``upop`` with the options of ``recipe`` that are no defaults, for a shell.

    Sparsity and criterion are always included. A recipe that options can't express is repeated from the run's own file.

    Args:
        recipe: values by option; lists repeat the option, mappings give ``key=value``, None is left out.
        output: the directory of the repeated run.
    """
    kind = kind_of(recipe)
    command = f"ecoflap {kind.title if issubclass(kind, Finetune) else 'prune'}"
    if any(recipe.get(field) for field in FILE_ONLY):
        again = [shlex.join(words) for words in _code(recipe)]  # a recipe file may not ask for code
        return " \\\n  ".join((command, "--recipe recipe.yaml", *again, shlex.join(["--output", output])))
    lines = [command + (f" {shlex.quote(str(recipe['model']))}" if recipe.get("model") else "")]
    defaults = kind.parse({}).to_dict()
    always = ("sparsity",) if issubclass(kind, Finetune) else ("sparsity", "criterion")
    for key, value in recipe.items():
        if key in _NOT_REPEATED or (kind is UPop and key in HIDDEN):
            continue
        if key in always or key not in defaults or value != defaults[key]:
            lines += (shlex.join(words) for words in flags(flag_of(key), value))
    lines.append(shlex.join(["--output", output]))
    return " \\\n  ".join(lines)


def kind_of(recipe: Mapping[str, Any]) -> type[Recipe]:
    """The class of the recipe, by its command."""
    if not recipe.get(TRAIN):
        return Recipe
    return UPop if "sparsity" in recipe else Finetune


def _code(recipe: Mapping[str, Any]) -> list[list[str]]:
    """The flags that allow a recipe file to run code, if it does."""
    trusted = flags("--trust-remote-code", recipe.get("trust_remote_code") or None)
    objective = str(recipe.get("objective") or "")
    return [*trusted, *(flags("--objective", objective) if ":" in objective else [])]


def flags(option: str, value: Any) -> list[list[str]]:
    """The words of an option with this value; none for None."""
    if value is None:
        return []
    if value is False:
        return [[f"--no-{option[2:]}"]]
    if value is True:
        return [[option]]
    if isinstance(value, Mapping):
        return [[option, f"{key}={item}"] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [[option, str(item)] for item in value]
    return [[option, str(value)]]


def flat(value: Any) -> str:
    """A recipe's value on one line."""
    if value is None or value in ({}, [], ""):
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(flat(item) for item in value)
    return str(value)


def options(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The recipe's options; unset ones show their default for the embedded model."""
    embedded = {"model": "embedded VLM", "calibration": "bundled samples", "test": "bundled questions"}
    for key, value in recipe.items():
        if key not in RECORDS and key not in idle_fields(recipe):
            stands_for = embedded.get(key) if value is None and recipe.get("model") is None else None
            yield key, stands_for or flat(value)


def environment(recipe: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded environment of a run, else the versions in its recipe; and the fingerprint."""
    found = dict(measured) or {"versions": recipe.get("versions") or {}}
    return found | ({"fingerprint": recipe["fingerprint"]} if recipe.get("fingerprint") else {})


def records(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested records as (label, text) pairs: {"versions": {"torch": "2.13"}} gives ("versions torch", "2.13")."""
    for key, item in value.items():
        label = f"{prefix} {key}".strip()
        if isinstance(item, Mapping):
            yield from records(label, item)
        else:
            yield label, flat(item)


@dataclass(frozen=True)
class OnDisk:
    """Bytes of the saved weight files, and without zeros: of the run's packed model, else computed; None if unknown."""

    saved: int
    packed: int | None
    computed: bool = True


def on_disk(run: RunData) -> OnDisk | None:
    """Sizes of the saved model's ``*.safetensors`` files; None if there are none.

    The files contain the zeros, so they are as large as the dense model's. Without zeros, a model needs one mask bit
    for each prunable weight, and the nonzero values:
    ``saved − zeros · bytes per weight + prunable weights / 8``, with the bytes per weight of the whole file.
    """
    saved, packed = weight_bytes(run.path / MODEL), weight_bytes(run.path / PACKED)
    if not saved:
        return None
    if packed:
        return OnDisk(saved, packed, computed=False)
    sparsity = run.metrics.sparsity if run.metrics else None
    if not sparsity or not sparsity.model_parameters or not sparsity.prunable_parameters or not sparsity.towers:
        return OnDisk(saved, None)
    zeros = sum(tower.zeros for tower in sparsity.towers.values())
    without = saved - zeros * saved / sparsity.model_parameters + sparsity.prunable_parameters / 8
    return OnDisk(saved, round(without))
