"""The command line that repeats a run, from its recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ecoflap.recipe import FILE_ONLY, Recipe, flag_of

RECORDS = ("versions", "fingerprint", "format")  # what a recipe notes about its run, not options
_NOT_REPEATED = {*RECORDS, "model", "output", "overwrite", "resume", "quiet", "json", "recipe"}


def reproduce(recipe: Mapping[str, Any], output: str = "runs/again") -> str:
    """``ecoflap prune`` with the options of ``recipe`` that are not the defaults, one a line, quoted for a POSIX shell.

    Args:
        recipe: flat option names to values; lists repeat the option, mappings give ``key=value``, None is left out.
        output: the directory of the repeated run.

    A recipe with what no option can say is repeated from the run's own file.
    """
    if any(recipe.get(field) for field in FILE_ONLY):
        return " \\\n  ".join(("ecoflap prune", "--recipe recipe.yaml", shlex.join(["--output", output])))
    lines = ["ecoflap prune" + (f" {shlex.quote(str(recipe['model']))}" if recipe.get("model") else "")]
    defaults = Recipe.parse({}).to_dict()
    for key, value in recipe.items():
        if key not in _NOT_REPEATED and (key == "sparsity" or key not in defaults or value != defaults[key]):
            lines += (shlex.join(words) for words in _options(flag_of(key), value))
    lines.append(shlex.join(["--output", output]))
    return " \\\n  ".join(lines)


def _options(option: str, value: Any) -> list[list[str]]:
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
