"""The plots of an allocation search: the loss on its way, and what the blocks' lost weights cost at its end."""

from __future__ import annotations

from ecoflap.report import formats
from ecoflap.report.charts import Axis, Chart, Series, Style, modality_colour, places
from ecoflap.report.data import BlockRow, Search
from ecoflap.report.run_charts import block_chart, by_tower


def loss_charts(search: Search | None) -> list[Chart]:
    """The measured loss at the beginning and after each step that was taken."""
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
    """What the weights that each block has lost cost, by the last round; the same scale for every tower."""
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
    """Ends of an axis with 0 on it; noise may bring a cost below."""
    low, high = min(0.0, *values), max(0.0, *values)
    return 1.08 * low, 1.08 * high or 1.0
