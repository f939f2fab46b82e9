"""Digests of the files that a recipe names, so that a run is not resumed with others under the same names."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from ecoflap.evaluations import evaluations_of
from ecoflap.recipe import Recipe


def digests_of(recipe: Recipe) -> dict[str, str]:
    """What is read beside model and calibration data: test data, scores, an allocation, the user's own objective."""
    named = {f"test data of {entry.name}": entry.test for entry in evaluations_of(recipe)}
    scores = recipe.importance if recipe.importance.endswith(".json") else None
    named |= {"allocation": recipe.allocation, "importance": scores}
    found = {what: digest for what, source in named.items() if source and (digest := source_digest(source))}
    module, colon, _ = str(recipe.objective).partition(":")
    spec = importlib.util.find_spec(module) if colon else None
    if spec is not None and spec.origin and (digest := source_digest(spec.origin)):
        found["objective"] = digest
    return found


def source_digest(source: str) -> str | None:
    """SHA-256 of a file's content; of a folder, of the names and sizes of all files in it.

    The name of a split after a colon does not matter; None for what is no file or folder here (an id of the Hub).
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = Path(source.rpartition(":")[0]).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    if not path.is_dir() or path == Path():
        return None
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            digest.update(f"{entry.relative_to(path)}\0{entry.stat().st_size}\0".encode())
    return digest.hexdigest()
