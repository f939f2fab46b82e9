"""Methods × sparsities × seeds on one model: the grid, its table and its plots."""

from __future__ import annotations

from pathlib import Path

COMPARISON = "compare.json"


def is_compare(folder: str | Path) -> bool:
    """Whether ``folder`` holds the result of ``ecoflap compare``."""
    return (Path(folder) / COMPARISON).is_file()
