"""Makes terminal tables, and plain data, of a model's anatomy: towers, layers, dense weights with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ecoflap.cli.tables import add_row, new_table, percent
from ecoflap.model.parts import Anatomy, Unprunable
from ecoflap.report.mixtures import mixture_rows


def anatomy_tables(anatomy: Anatomy, note: str) -> Iterator[Table]:
    """Tables of the towers with their sizes, of the kinds of layers, and of dense weights with the reason."""
    total = anatomy.total_parameters
    towers = new_table(note, "tower", "modality", "blocks", "layers", "prunable weights", "of the model")
    for tower in anatomy.towers:
        share = percent(tower.numel / total)
        add_row(
            towers,
            tower.name,
            tower.modality,
            str(len(tower.blocks)),
            str(len(tower.layers)),
            f"{tower.numel:,}",
            share,
        )
    towers.add_section()
    share = percent(anatomy.prunable_parameters / total)
    blocks = str(len(anatomy.blocks))
    add_row(towers, "all", "", blocks, str(len(anatomy.layers)), f"{anatomy.prunable_parameters:,}", share)
    half = percent(0.5 * anatomy.prunable_parameters / total)
    caption = f"sparsity 50.0 % of the prunable weights is {half} of the whole model\n"
    towers.caption = Text(caption, justify="left")
    towers.caption_justify = "left"
    yield towers

    kinds = new_table("layers", "in each block of the tower", "shape", "matrices", "weights")
    for tower in anatomy.towers:
        count: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
        for layer in tower.layers:
            count[(layer.kind, layer.shape)] += 1
        add_row(kinds, f"{tower.name}:", "", "", "")
        for (name, shape), times in count.items():
            add_row(kinds, f"  {name}", f"{shape[0]} × {shape[1]}", str(times), f"{times * shape[0] * shape[1]:,}")
    yield kinds

    for title, dense in (("dense, inside blocks", anatomy.unprunable), ("dense, outside of blocks", anatomy.outside)):
        if dense:
            yield _dense_table(title, dense, total)


def experts_tables(routing: Mapping[str, Mapping[str, int]]) -> Iterator[Table]:
    """For each mixture, the experts' shares of the router's choices, and the experts that get none."""
    if not routing:
        return
    table = new_table("experts", "tokens sent", "least", "median", "most", "never chosen")
    for row in mixture_rows(routing):
        shares = [percent(share) for share in (row.least, row.median, row.most)]
        add_row(table, f"{row.name}: {row.experts}", f"{row.tokens:,}", *shares, ", ".join(row.idle) or "–")
    yield table


def _dense_table(title: str, dense: Sequence[Unprunable], total: int) -> Table:
    table = new_table(title, "reason", "weights", "of the model", "for example")
    reasons: dict[str, list[Unprunable]] = defaultdict(list)
    for entry in dense:
        reasons[entry.reason].append(entry)
    for reason, entries in reasons.items():
        size = sum(entry.numel for entry in entries)
        add_row(table, reason, f"{size:,}", percent(size / total), entries[0].name)
    table.add_section()
    size = sum(entry.numel for entry in dense)
    add_row(table, "all", f"{size:,}", percent(size / total), "")
    return table


def anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    """The same as plain data, with every layer."""
    return {
        "total_parameters": anatomy.total_parameters,
        "prunable_parameters": anatomy.prunable_parameters,
        "prunable_share": anatomy.prunable_parameters / anatomy.total_parameters,
        "dense_parameters": sum(entry.numel for entry in anatomy.unprunable),
        "traced": anatomy.traced,
        "towers": [
            {
                "name": tower.name,
                "modality": tower.modality,
                "blocks": [
                    {
                        "name": block.name,
                        "layers": [{"name": layer.name, "shape": list(layer.shape)} for layer in block.layers],
                    }
                    for block in tower.blocks
                ],
            }
            for tower in anatomy.towers
        ],
        "dense": [{"name": e.name, "reason": e.reason, "weights": e.numel} for e in anatomy.unprunable],
        "outside": [{"name": e.name, "reason": e.reason, "weights": e.numel} for e in anatomy.outside],
    }
