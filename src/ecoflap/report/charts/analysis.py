"""Charts of ``analysis/*.json``: distributions, agreement of measures, effects of options, the loss landscape."""

from __future__ import annotations

from math import log10

from ecoflap.report.analyses import Agreement, Distributions, Effect, Effects, Landscape, Plane
from ecoflap.report.charts.chart import Axis, Chart, Heat, Number, Series, Style, log_ticks, style, tower_styles
from ecoflap.support import formats

QUANTITIES = {
    "weight": ("weights", "log10 |w|"),
    "gradient": ("gradients", "log10 |g|"),
    "local": ("local scores", "log10 |w|·‖x‖"),
}
_CONTRAST = 20.0  # ratio of the largest to the smallest loss from which the scale is logarithmic
_LOOKS = {"dense": Style("c1"), "pruned": Style("c2", 1, 1)}


def distribution_charts(content: Distributions) -> list[Chart]:
    """One plot per quantity, one outline per tower, to show why local scores of towers can't be compared."""
    looks = tower_styles({name: tower.modality for name, tower in content.towers.items()})
    charts = []
    for key, (title, axis) in QUANTITIES.items():
        found = {name: getattr(tower, key) for name, tower in content.towers.items()}
        found = {name: histogram for name, histogram in found.items() if histogram is not None}
        series = []
        words = []
        for name, histogram in found.items():
            edges, share = histogram.log10_edges, histogram.share
            hover = [
                f"{name}\n10^{a:.2f} to 10^{b:.2f}: {formats.percent(value)}"
                for a, b, value in zip(edges[:-1], edges[1:], share, strict=True)
            ]
            series.append(Series(name, "step", edges, share, looks[name], hover))
            words.append(name + _middle(histogram.median, histogram.zeros))
        if series:
            charts.append(
                Chart(
                    caption=f"Absolute {title}",
                    description=f"Distribution of the absolute {title} per tower: {'; '.join(words)}.",
                    x=Axis(axis),
                    y=Axis(
                        "share", percent=True, limits=(0.0, 1.08 * max(max(found[name].share) for name in found) or 1.0)
                    ),
                    series=series,
                )
            )
    return charts


def _middle(median: float | None, zeros: float | None) -> str:
    words = [] if median is None else [f"median {formats.significant(median)}"]
    if zeros:
        words.append(f"{formats.percent(zeros)} exact zeros")
    return f" ({', '.join(words)})" if words else ""


def agreement_chart(content: Agreement) -> Chart:
    """Rank correlations of all pairs of measures as a matrix with numbers."""
    names = content.measures
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(content.spearman)
        for j, value in enumerate(row)
        if j < i and value is not None
    ]
    ends = ""
    if pairs:
        (low, a, b), (high, c, d) = min(pairs), max(pairs)
        ends = f", from {low:.2f} ({a}, {b}) to {high:.2f} ({c}, {d})"
    return Chart(
        caption=f"Spearman's rank correlation of {content.granularity} scores"
        + (f", {content.n} of them" if content.n is not None else ""),
        description=f"Rank correlation of {len(names)} importance measures{ends}.",
        x=Axis(""),
        y=Axis(""),
        heat=Heat(
            rows=names,
            columns=names,
            z=content.spearman,
            hover=[
                [f"{names[i]}, {names[j]}\n{_correlation(value)}" for j, value in enumerate(row)]
                for i, row in enumerate(content.spearman)
            ],
            low=-1.0,
            high=1.0,
            ends=("−1", "1"),
            text=[[_in_cell(value) for value in row] for row in content.spearman],
            diverging=True,
        ),
        wide=True,
    )


def _in_cell(value: Number) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _correlation(value: Number) -> str:
    return formats.MISSING if value is None else f"{value:.3f}"


def effect_charts(content: Effects) -> list[Chart]:
    """Agreement with the exact gradient norm against each option."""
    return [_effect(option, values) for option, values in content.effects.items() if values]


def share_charts(content: Effects) -> list[Chart]:
    """Each tower's sparsity against options of the allocation."""
    return [_allocations(option, found) for option, found in content.allocations.items() if found]


def _effect(option: str, values: list[Effect]) -> Chart:
    spread = [effect.value for effect in values]
    log = min(spread) > 0 and max(spread) / min(spread) > 4
    kinds = [
        ("rank correlation", [(e.value, e.spearman, e.stderr) for e in values if e.spearman is not None]),
        ("relative error", [(e.value, e.error, e.error_stderr) for e in values if e.error is not None]),
    ]
    return Chart(
        caption=f"Effect of {option}",
        description=f"Rank correlation with the exact gradient norm against {option}: "
        + "; ".join(f"{formats.significant(value)}: {_correlation(found)}" for value, found, _ in kinds[0][1])
        + ".",
        x=Axis(option, log=log, ticks=sorted(set(spread))),
        y=Axis("correlation, error"),
        series=[
            Series(
                name,
                "line",
                [value for value, _, _ in points],
                [found for _, found, _ in points],
                Style(f"c{number + 1}", number, number),
                [f"{option} {value:g}\n{name} {_pm(found, stderr)}" for value, found, stderr in points],
                [stderr for _, _, stderr in points],
            )
            for number, (name, points) in enumerate(kinds)
            if points or not number
        ],
    )


def _pm(found: Number, stderr: Number) -> str:
    return _correlation(found) + ("" if stderr is None else f" ± {stderr:.3f}")


def _allocations(option: str, found: dict[str, dict[str, float | None]]) -> Chart:
    towers = list(dict.fromkeys(tower for sparsities in found.values() for tower in sparsities))
    values = list(found)
    return Chart(
        caption=f"Sparsity of the towers by {option}",
        description="; ".join(
            f"{option} {value}: " + ", ".join(f"{t} {formats.percent(sparsity)}" for t, sparsity in sparsities.items())
            for value, sparsities in found.items()
        )
        + ".",
        x=Axis(option),
        y=Axis("sparsity", percent=True),
        series=[
            Series(
                tower,
                "bar",
                values,
                [found[value].get(tower) for value in values],
                style(index),
                [f"{tower}\n{option} {value}: {formats.percent(found[value].get(tower))}" for value in values],
            )
            for index, tower in enumerate(towers)
        ],
    )


def landscape_charts(content: Landscape) -> list[Chart]:
    """The loss along one direction, and over two: the dense and the pruned model on one scale."""
    charts = []
    if content.line is not None:
        line = content.line
        known = [v for v in (*line.dense, *line.pruned) if v is not None]
        charts.append(
            Chart(
                caption="Along one random direction",
                description="Loss of the dense and of the pruned model along one random direction.",
                x=Axis("α"),
                y=_loss_axis(known),
                series=[_along(name, line.alpha, getattr(line, name)) for name in _LOOKS],
            )
        )
    if content.plane is not None:
        plane = content.plane
        known = [v for rows in (plane.dense, plane.pruned) for row in rows for v in row if v is not None]
        if known:
            charts += [_plane(name, plane, known) for name in ("dense", "pruned")]
    return charts


def _along(name: str, alpha: list[float], losses: list[float | None]) -> Series:
    hover = [f"{name}\nα {a:g}: {_loss(loss)}" for a, loss in zip(alpha, losses, strict=True)]
    return Series(name, "line", alpha, losses, _LOOKS[name], hover)


def _plane(name: str, plane: Plane, known: list[float]) -> Chart:
    log = _wide(known)
    rows: list[list[float | None]] = getattr(plane, name)

    def level(value: float | None) -> float | None:
        return value if value is None or not log else log10(value)

    low, high = level(min(known)), level(max(known))
    own = [value for row in rows for value in row if value is not None]
    return Chart(
        caption=f"Over two random directions: {name}" + (", logarithmic shades" if log else ""),
        description=f"Loss of the {name} model over two random directions, "
        + (f"from {_loss(min(own))} to {_loss(max(own))}." if own else "not measured."),
        x=Axis("β"),
        y=Axis("α"),
        heat=Heat(
            rows=_numbers(plane.alpha),
            columns=_numbers(plane.beta),
            z=[[level(value) for value in row] for row in rows],
            hover=[
                [f"α {a:g}, β {b:g}\nloss {_loss(value)}" for b, value in zip(plane.beta, row, strict=True)]
                for a, row in zip(plane.alpha, rows, strict=True)
            ],
            low=low or 0.0,
            high=high or 0.0,
            ends=(_loss(min(known)), _loss(max(known))),
        ),
    )


def _numbers(values: list[float]) -> list[str]:
    return [f"{value:g}".replace("-", "−") for value in values]


def _loss_axis(known: list[float]) -> Axis:
    if not _wide(known):
        return Axis("loss")
    limits = min(known) / 1.3, max(known) * 1.3
    return Axis("loss", log=True, limits=limits, ticks=log_ticks(limits))


def _wide(values: list[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _CONTRAST


def _loss(value: float | None) -> str:
    return formats.MISSING if value is None else formats.significant(value, 4)
