"""The allocation as a heat map, block by kind of matrix, a panel a tower; drawn of ``allocation.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ecoflap.allocation import LayerAllocation
from ecoflap.report.analysis.drawing import drawing, shown_ticks, title_of
from ecoflap.report.analysis.registry import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject


def kind_of(layer: LayerAllocation) -> str:
    """What a matrix is in its block, such as ``attention.q_proj``."""
    return layer.name.removeprefix(layer.block + ".").removesuffix(".weight")


def heat_map(layers: Sequence[LayerAllocation]) -> tuple[list[str], list[str], np.ndarray]:
    """Kinds of matrices, blocks, and sparsities ``[kinds, blocks]`` of one tower; NaN where a block has no such matrix.

    The sparsity is the achieved one where it is known.
    """
    kinds = list(dict.fromkeys(kind_of(layer) for layer in layers))
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for layer in layers:
        shown = layer.sparsity if layer.achieved is None else layer.achieved
        grid[kinds.index(kind_of(layer)), blocks.index(layer.block)] = shown
    return kinds, blocks, grid


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """Sparsity by colour, and in numbers where there is room."""
    from matplotlib.figure import Figure

    allocation = subject.allocation
    towers: dict[str, list[LayerAllocation]] = {}
    for layer in allocation.layers:
        towers.setdefault(layer.tower, []).append(layer)
    maps = {tower: heat_map(layers) for tower, layers in towers.items()}
    values = np.concatenate([grid[~np.isnan(grid)] for _, _, grid in maps.values()])
    low, high = float(values.min()), float(values.max())
    margin = max(0.02 - (high - low), 0) / 2  # a flat allocation is one colour, and not noise stretched to all
    height = sum(0.24 * len(kinds) + 0.75 for kinds, _, _ in maps.values())
    widest = max(len(blocks) for _, blocks, _ in maps.values())
    with drawing():
        figure = Figure(figsize=(min(max(3.6 + 0.42 * widest, 5.0), 14), height), layout="constrained")
        rows = figure.subplots(
            len(maps), 1, squeeze=False, height_ratios=[len(kinds) + 1.5 for kinds, _, _ in maps.values()]
        )
        for (axes,), (tower, (kinds, blocks, grid)) in zip(rows, maps.items(), strict=True):
            shown = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=low - margin, vmax=high + margin)
            axes.grid(False)
            axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=7)
            axes.set_xticks(shown_ticks(len(blocks)))
            axes.set_title(title_of(tower, towers[tower][0].modality))
            if len(blocks) <= 16:
                for (row, column), value in np.ndenumerate(grid):
                    if not np.isnan(value):
                        dark = value < (low + high) / 2
                        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                                  color="white" if dark else "black")  # fmt: skip
        rows[-1][0].set_xlabel("block")
        figure.colorbar(shown, ax=[axes for (axes,) in rows], label="sparsity", format=lambda v, _: f"{100 * v:.0f} %",
                        fraction=0.04)  # fmt: skip
        return {"": figure}


def _short(kind: str) -> str:
    return kind if len(kind) <= 28 else "…" + kind[-27:]


ANALYSIS = Analysis(draw)
