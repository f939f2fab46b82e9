"""Charts of one run: sparsity and importance of each block and matrix, one for each tower; the steps of a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from ecoflap.model.parts import parameter_of
from ecoflap.report.charts.chart import (
    Axis,
    Chart,
    Heat,
    Rule,
    Series,
    Style,
    log_ticks,
    modality_colour,
    places,
    style,
)
from ecoflap.report.data import BlockRow, LayerAllocation, LayerScore, RunData, Search
from ecoflap.support import formats

_BEFORE = Style("ink", marker=2)
_ALIKE = 0.005  # differences of sparsities up to this don't show in whole per cent
MOST_NUMBERS = 24  # number of blocks up to which a heat map has space for numbers
MOST_KINDS = 16  # kinds of matrices that colours and dashes can distinguish


def sparsity_charts(run: RunData, blocks: list[BlockRow]) -> list[Chart]:
    """Bars of sparsity per block, with target, cap and the start of a search; the same scale for every tower."""
    if not run.allocation:
        return []
    target, cap = run.allocation.sparsity, run.allocation.max_sparsity
    highest = max((max(block.shown, block.given or 0.0) for block in blocks), default=0.0)
    top = min(1.0, max(target, cap or 0.0, highest) * 1.1 + 0.01)
    rules = [Rule(target, f"target {100 * target:.3g} %", 1)]
    if cap is not None and cap < 1:
        rules.append(Rule(cap, f"cap {100 * cap:.3g} %", 2))
    charts = []
    for own in by_tower(blocks).values():
        low, high = min(own, key=lambda block: block.shown), max(own, key=lambda block: block.shown)
        hover = [f"{b.name}\n{formats.percent(b.shown, 2)} of {formats.integer(b.weights)} weights" for b in own]
        bars = Series(
            "pruned", "bar", range(len(own)), [b.shown for b in own], Style(modality_colour(own[0].modality)), hover
        )
        series = [bars]
        if run.allocation.search:
            said = [f"{b.name}\n{formats.percent(b.given, 2)} before the search" for b in own]
            series.append(Series("before the search", "points", range(len(own)), [b.given for b in own], _BEFORE, said))
        ends = f"{formats.percent(low.shown)} ({low.name}) to {formats.percent(high.shown)} ({high.name})"
        scale = Axis("sparsity", percent=True, limits=(0.0, top))
        charts.append(block_chart("Sparsity", ends, own, scale, series, rules))
    return charts


def importance_charts(blocks: list[BlockRow]) -> list[Chart]:
    """Scores of the blocks with standard errors, on a logarithmic scale that all towers share."""
    limits = log_limits((block.score, block.stderr) for block in blocks)
    if limits is None:
        return []
    charts = []
    for tower, own in by_tower(blocks).items():
        known = [(block.score, block.name) for block in own if block.score is not None]
        if not known:
            continue
        (low, lowest), (high, highest) = min(known), max(known)
        shown = [(i, b) for i, b in enumerate(own) if b.score is not None and b.score > 0]
        points = Series(
            tower,
            "points",
            [i for i, _ in shown],
            [b.score for _, b in shown],
            Style(modality_colour(own[0].modality)),
            [f"{b.name}\n{_score(b.score, b.stderr)}" for _, b in shown],
            [b.stderr for _, b in shown],
        )
        ends = f"{formats.significant(low)} ({lowest}) to {formats.significant(high)} ({highest})"
        scale = Axis("score", log=True, limits=limits, ticks=log_ticks(limits))
        charts.append(block_chart("Importance", ends, own, scale, [points]))
    return charts


def layer_importance_charts(run: RunData) -> list[Chart]:
    """Scores of the single matrices with standard errors: a row of points for each kind of matrix."""
    scores = _summed(run.scores.values())
    limits = log_limits((layer.score, layer.stderr) for layer in scores.values())
    if limits is None or not run.allocation:
        return []
    charts = []
    for tower, (blocks, kinds) in _matrices(run.allocation.layers).items():
        series = []
        for index, (kind, layers) in enumerate(kinds.items()):
            aside = 0.7 * ((index + 0.5) / len(kinds) - 0.5)  # kinds are drawn side by side, so that they don't overlap
            own = [(blocks.index(layer.block) + aside, scores[layer.name]) for layer in layers if layer.name in scores]
            found = [(place, score) for place, score in own if score.score > 0]
            if found:
                series.append(
                    Series(
                        kind,
                        "points",
                        [place for place, _ in found],
                        [score.score for _, score in found],
                        style(index),
                        [f"{score.name}\n{_score(score.score, score.stderr)}" for _, score in found],
                        [score.stderr for _, score in found],
                    )
                )
        if series and len(kinds) <= MOST_KINDS:
            charts.append(
                Chart(
                    caption=tower,
                    description=f"Importance of the matrices of {tower} by block and kind; the table of layers has "
                    "the numbers.",
                    x=_blocks(len(blocks)),
                    y=Axis("score", log=True, limits=limits, ticks=log_ticks(limits)),
                    series=series,
                    modality=next(iter(kinds.values()))[0].modality,
                )
            )
    return charts


def differs_in_blocks(run: RunData) -> bool:
    """Whether matrices of a block differ in sparsity, so that heat maps show more than the bars of blocks."""
    found: dict[str, list[float]] = {}
    for layer in run.allocation.layers if run.allocation else ():
        found.setdefault(layer.block, []).append(shown(layer))
    return any(max(own) - min(own) > _ALIKE for own in found.values())


def heat_charts(run: RunData) -> list[Chart]:
    """Sparsity as a heat map, block × kind of matrix: the achieved one, else the target."""
    if not run.allocation:
        return []
    layers = run.allocation.layers
    top = max((shown(layer) for layer in layers), default=0.0) or 1.0
    charts = []
    for tower, (blocks, kinds) in _matrices(layers).items():
        cells = {(layer.block, kind): layer for kind, own in kinds.items() for layer in own}
        found = [[cells.get((block, kind)) for block in blocks] for kind in kinds]
        values = [shown(layer) for row in found for layer in row if layer]
        charts.append(
            Chart(
                caption=tower,
                description=f"Sparsity of {len(values)} matrices of {tower} by block and kind, from "
                f"{formats.percent(min(values))} to {formats.percent(max(values))}; the table of layers has the "
                "numbers.",
                x=Axis("block"),
                y=Axis(""),
                heat=Heat(
                    rows=list(kinds),
                    columns=[str(index) for index in range(len(blocks))],
                    z=[[shown(layer) if layer else None for layer in row] for row in found],
                    hover=[[_cell(layer) if layer else "" for layer in row] for row in found],
                    low=0.0,
                    high=top,
                    ends=("0 %", formats.percent(top)),
                    text=[[f"{100 * shown(layer):.0f}" if layer else "" for layer in row] for row in found]
                    if len(blocks) <= MOST_NUMBERS
                    else None,
                ),
                modality=next(iter(kinds.values()))[0].modality,
            )
        )
    return charts


def block_chart(
    what: str, ends: str, own: list[BlockRow], y: Axis, series: Sequence[Series], rules: Sequence[Rule] = ()
) -> Chart:
    """A chart of ``what`` for the blocks ``own`` of one tower; ``ends`` is the range as text."""
    return Chart(
        caption=own[0].tower,
        description=f"{what} of the {len(own)} blocks of {own[0].tower}, from {ends}.",
        x=_blocks(len(own)),
        y=y,
        series=series,
        rules=rules,
        modality=own[0].modality,
    )


def _blocks(count: int) -> Axis:
    return Axis("block", limits=(-0.7, count - 0.3), ticks=places(count))


def by_tower(blocks: list[BlockRow]) -> dict[str, list[BlockRow]]:
    """The blocks of each tower, in order."""
    towers: dict[str, list[BlockRow]] = {}
    for block in blocks:
        towers.setdefault(block.tower, []).append(block)
    return towers


def log_limits(scores: Iterable[tuple[float | None, float | None]]) -> tuple[float, float] | None:
    """Limits of a logarithmic axis for all positive (score, error); None if there are none."""
    positive = [(score, error or 0.0) for score, error in scores if score is not None and score > 0]
    if not positive:
        return None
    return min(score for score, _ in positive) / 2, max(score + error for score, error in positive) * 1.6


def shown(layer: LayerAllocation) -> float:
    """The achieved sparsity if it was measured, else the target."""
    return layer.sparsity if layer.achieved is None else layer.achieved


def _matrices(layers: list[LayerAllocation]) -> dict[str, tuple[list[str], dict[str, list[LayerAllocation]]]]:
    """By tower, its blocks, and its layers by the kind of matrix: the name without block and ``.weight``.

    The slices of a parameter (the experts of a mixture) are combined.
    """
    towers: dict[str, tuple[list[str], dict[str, list[LayerAllocation]]]] = {}
    for layer in (_together(list(slices)) for _, slices in groupby(layers, lambda layer: parameter_of(layer.name))):
        blocks, kinds = towers.setdefault(layer.tower, ([], {}))
        if layer.block not in blocks:
            blocks.append(layer.block)
        kind = layer.name.removeprefix(f"{layer.block}.").removesuffix(".weight")
        kinds.setdefault(kind, []).append(layer)
    return towers


def _together(slices: list[LayerAllocation]) -> LayerAllocation:
    """One row for all slices of a parameter; a single row is returned unchanged."""
    first, weights = slices[0], sum(row.weights for row in slices)
    if len(slices) == 1:
        return first
    achieved = None
    if all(row.achieved is not None for row in slices):
        achieved = sum((row.achieved or 0.0) * row.weights for row in slices) / weights
    target = sum(row.sparsity * row.weights for row in slices) / weights
    whole = {"name": parameter_of(first.name), "weights": weights, "sparsity": target, "achieved": achieved}
    return first.model_copy(update=whole)


def _summed(scores: Iterable[LayerScore]) -> dict[str, LayerScore]:
    """Scores by parameter: for stacked experts, the sum of their scores, with independent errors."""
    found: dict[str, LayerScore] = {}
    for score in scores:
        name = parameter_of(score.name)
        if name not in found:
            found[name] = score if name == score.name else score.model_copy(update={"name": name})
            continue
        other = found[name]
        error = None if score.stderr is None or other.stderr is None else math.hypot(score.stderr, other.stderr)
        found[name] = other.model_copy(update={"score": other.score + score.score, "stderr": error})
    return found


def _cell(layer: LayerAllocation) -> str:
    return f"{layer.name}\n{formats.percent(shown(layer), 2)} of {formats.integer(layer.weights)} weights"


def _score(score: float | None, stderr: float | None) -> str:
    return formats.significant(score or 0.0) + ("" if stderr is None else f" ± {formats.significant(stderr, 2)}")


def loss_charts(search: Search | None) -> list[Chart]:
    """The measured loss at the start and after each accepted step."""
    if search is None or len(search.losses) < 2:
        return []
    count = len(search.losses)
    hover = [f"{name}\n{formats.significant(loss)}" for name, loss in zip(search.rounds, search.losses, strict=True)]
    first, last = (formats.significant(search.losses[end]) for end in (0, -1))
    return [
        Chart(
            caption=f"{search.title} after each step",
            description=f"{search.title} over {count - 1} steps, from {first} to {last}.",
            x=Axis("step", limits=(-0.5, count - 0.5), ticks=places(count)),
            y=Axis(search.metric, limits=_ends(search.losses)),
            series=[Series("loss", "line", range(count), search.losses, Style("c1"), hover)],
            wide=True,
        )
    ]


def cost_charts(search: Search | None, blocks: list[BlockRow]) -> list[Chart]:
    """The cost of each block's pruned weights in the last round; the same scale for every tower."""
    if search is None or not search.costs:
        return []
    costs = search.costs
    limits = _ends(list(costs.values()))
    charts = []
    for tower, own in by_tower(blocks).items():
        known = [(costs[block.name], block.name, place) for place, block in enumerate(own) if block.name in costs]
        if not known:
            continue
        (low, lowest, _), (high, highest, _) = min(known), max(known)
        values, _, at = zip(*known, strict=True)
        hover = [f"{name}\n{formats.significant(cost)}" for cost, name, _ in known]
        bars = Series(tower, "bar", at, values, Style(modality_colour(own[0].modality)), hover)
        ends = f"{formats.significant(low)} ({lowest}) to {formats.significant(high)} ({highest})"
        scale = Axis(f"cost ({search.metric})", limits=limits)
        charts.append(block_chart("Cost", ends, own, scale, [bars]))
    return charts


def _ends(values: list[float]) -> tuple[float, float]:
    """Limits of an axis that contains 0; noise may make a cost negative."""
    low, high = min(0.0, *values), max(0.0, *values)
    return 1.08 * low, 1.08 * high or 1.0
