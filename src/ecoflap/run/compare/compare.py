"""Runs ``ecoflap.compare``: a grid, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.run.compare.record import Comparison

if TYPE_CHECKING:
    from ecoflap.support.progress import Progress


def compare(
    model: str | None = None,
    methods: Sequence[str] | str | None = None,
    sparsities: Sequence[float] | str | None = None,
    seeds: Sequence[int] | str | None = None,
    *,
    output: str | Path = "ecoflap-compare",
    overwrite: bool = False,
    resume: bool = False,
    low_memory: bool = False,
    keep: str = "none",
    progress: Progress | None = None,
    **fields: Any,
) -> Comparison:
    """Compare methods on one model, at several sparsities and with several seeds; write table, plots and page.

    Args:
        model: a hub id, folder or GGUF file; None for the embedded model.
        methods: ``"zeroth-order+wanda"``, ``"owl+sparsegpt"``, ``"wanda"``, ``"first-order+wanda:variant=fisher"``, …
        sparsities: numbers, or ``"0.3:0.7:0.1"``.
        seeds: of sample choice and noise.
        output: the folder to write.
        overwrite: replace the comparison in ``output``.
        resume: continue it; methods, sparsities and seeds may be added.
        low_memory: keep the dense weights on disk, not in memory, meanwhile.
        keep: which cells' models are saved in ``models/``: ``none``, ``all``, or the ``best`` of each sparsity.
        progress: where to report.
        fields: any other field of a recipe: ``calibration=``, ``task=``, ``test=``, ``samples=``, …

    Returns:
        The content of ``compare.json``: ``comparison.summary("wanda", 0.5).mean``, ``comparison.cells``.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    from ecoflap.run.compare.grid import run_grid
    from ecoflap.run.compare.recipe import Grid

    axes = {"model": model, "methods": methods, "sparsities": sparsities, "seeds": seeds}
    grid = Grid.parse({**{name: value for name, value in axes.items() if value is not None}, **fields})
    return run_grid(
        grid, output, overwrite=overwrite, resume=resume, low_memory=low_memory, progress=progress, keep=keep
    )
