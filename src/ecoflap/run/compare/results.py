"""Writes the files that show a comparison: JSON, CSV, Markdown, plots, page, and the command that repeats it."""

from __future__ import annotations

import shlex
from pathlib import Path

from ecoflap.run.compare.folder import LINES, TABLE
from ecoflap.run.compare.recipe import Grid
from ecoflap.run.compare.record import Comparison
from ecoflap.run.compare.rows import as_csv
from ecoflap.run.compare.tables import as_markdown
from ecoflap.run.names import COMPARISON, RECIPE
from ecoflap.run.pages import PAGES
from ecoflap.run.recipe import FILE_ONLY, flag_of
from ecoflap.support.files import write_json, write_text


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write every file that shows ``comparison``; ``compare.md`` comes last.

    Raises:
        StorageError: a file can't be written.
    """
    write_json(folder / COMPARISON, comparison.model_dump(mode="json"))
    write_text(folder / LINES, as_csv(comparison))
    PAGES.get("compare-plots")(folder)
    PAGES.get("compare")(folder)
    write_text(folder / TABLE, as_markdown(comparison))


def command_of(grid: Grid, folder: Path) -> str:
    """``ecoflap compare`` with the options that are not the defaults, one per line, quoted for a POSIX shell.

    A grid with values that no option can express is repeated from its own file.
    """
    values, defaults = grid.to_dict(), Grid.parse({}).to_dict()
    output = shlex.join(["--output", f"{folder.name}-again"])
    if any(values.get(field) for field in FILE_ONLY):
        return " \\\n  ".join(("ecoflap compare", shlex.join(["--recipe", str(folder / RECIPE)]), output))
    lines = ["ecoflap compare" + (f" {shlex.quote(grid.model)}" if grid.model else "")]
    for name, value in values.items():
        if name == "model" or (value == defaults[name] and name not in ("methods", "sparsities", "seeds")):
            continue
        flag = flag_of(name)
        if name in ("methods", "sparsities", "seeds"):
            lines.append(shlex.join([flag, ",".join(map(str, value))]))
        elif isinstance(value, bool):
            lines.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            lines += (shlex.join([flag, f"{key}={item}"]) for key, item in value.items())
        elif isinstance(value, list):
            lines += (shlex.join([flag, str(item)]) for item in value)
        elif value is not None:
            lines.append(shlex.join([flag, str(value)]))
    return " \\\n  ".join([*lines, output])
