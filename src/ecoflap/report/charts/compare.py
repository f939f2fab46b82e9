"""Charts of a comparison: quality over sparsity, time and memory, each tower's sparsity; one style for each method."""

from __future__ import annotations

from pathlib import Path

from ecoflap.report.charts.chart import DASHES, HUES, Axis, Chart, Rule, Series, Style, log_ticks, style
from ecoflap.report.comparison import Comparison, StoredModel, Test, mean, read_comparison
from ecoflap.report.places import place_name
from ecoflap.support import formats

_CONTRAST = 20.0  # ratio of the largest to the smallest value from which the scale is logarithmic
_LEAST = 0.02  # least limits of an axis of differences, so that whole per cents are on it
_MEGABYTE, _GIGABYTE = 1e6, 1e9


def quality_chart(content: Comparison, test: Test) -> Chart | None:
    """One line per method with the spread over seeds as a band, and the dense model as a dashed line."""
    share = formats.unit_of(test.metric, test.unit) == "%"
    dense = test.dense.value
    series = []
    everything = [] if dense is None else [dense]
    for index, method in enumerate(content.methods):
        points = [(sparsity, content.average(method.name, sparsity, test)) for sparsity in content.sparsities]
        known = [(s, a.mean, a.error or 0.0, a.seeds) for s, a in points if a.mean is not None]
        if not known:
            continue
        everything += [value for _, value, _, _ in known]
        hover = [
            f"{method.shown}\nsparsity {formats.percent(s)}: "
            + formats.metric_value(test.metric, value, spread or None, unit=test.unit)
            + (f"\n{seeds} seeds" if seeds > 1 else "")
            for s, value, spread, seeds in known
        ]
        low = [value - spread for _, value, spread, _ in known]
        high = [value + spread for _, value, spread, _ in known]
        x, y = [s for s, *_ in known], [value for _, value, _, _ in known]
        band = (low, high) if any(spread for _, _, spread, _ in known) else None
        series.append(Series(method.shown, "line", x, y, style(index), hover, band=band))
    if not series:
        return None
    log = not share and min(everything) > 0 and max(everything) / min(everything) > _CONTRAST
    axis = Axis(test.metric, percent=share)
    if log:  # a band that reaches zero can't be drawn on this scale
        limits = min(everything) / 1.3, max(everything) * 1.3
        axis = Axis(test.metric, log=True, limits=limits, ticks=log_ticks(limits))
        series = [_above(line, limits[0]) for line in series]
    shown = formats.metric_value(test.metric, dense, unit=test.unit)
    rules = [] if dense is None else [Rule(dense, f"dense {shown}", 1)]
    return Chart(
        caption=f"{test.title} against sparsity",
        description=f"{test.metric} of {len(series)} methods at {len(content.sparsities)} sparsities; "
        "the table below has the numbers.",
        x=Axis("sparsity", percent=True, ticks=content.sparsities),
        y=axis,
        series=series,
        rules=rules,
        wide=True,
    )


def bytes_chart(content: Comparison, test: Test) -> Chart | None:
    """Quality against stored bytes: one line for the quantised dense model, one for each method in each form."""
    lines: dict[str, list[StoredModel]] = {}
    for model in sorted(content.by_bytes(test), key=lambda model: model.bytes):
        lines.setdefault(model.line, []).append(model)
    if not lines:
        return None
    share = formats.unit_of(test.metric, test.unit) == "%"
    means = [model.average.mean or 0.0 for models in lines.values() for model in models]
    log = not share and min(means) > 0 and max(means) / min(means) > _CONTRAST
    series = []
    order = sorted(
        lines, key=lambda name: (lines[name][0].sparsity is not None, name)
    )  # dense: what others are held against
    for name in order:
        models = lines[name]
        y = [model.average.mean or 0.0 for model in models]
        errors = [model.average.error or 0.0 for model in models]
        band = ([v - e for v, e in zip(y, errors, strict=True)], [v + e for v, e in zip(y, errors, strict=True)])
        x = [model.bytes / _MEGABYTE for model in models]
        hover = [_stored_words(name, model, test) for model in models]
        look = _stored_style(content, models[0])
        series.append(Series(name, "line", x, y, look, hover, band=band if any(errors) else None))
    axis = Axis(test.metric, percent=share)
    if log:
        limits = min(means) / 1.3, max(means) * 1.3
        axis = Axis(test.metric, log=True, limits=limits, ticks=log_ticks(limits))
        series = [_above(line, limits[0]) for line in series]
    dense = test.dense.value
    shown = formats.metric_value(test.metric, dense, unit=test.unit)
    return Chart(
        caption=f"{test.title} against stored bytes",
        description=f"{test.metric} of {len(lines)} lines of models by the bytes of their prunable weights; "
        "the table below has the numbers.",
        x=Axis("MB of the prunable weights"),
        y=axis,
        series=series,
        rules=[] if dense is None else [Rule(dense, f"dense {shown}", 1)],
        wide=True,
    )


def _stored_style(content: Comparison, model: StoredModel) -> Style:
    """The colour of the model's method in the other plots; dash and marker show the form of the values."""
    names = [method.shown for method in content.methods]
    if model.sparsity is None or model.title not in names:
        return style(len(names))
    form = list(content.dense_stored).index(model.form)
    return Style(style(names.index(model.title)).colour, form % len(DASHES), form % HUES)


def _stored_words(name: str, model: StoredModel, test: Test) -> str:
    what = model.form if model.sparsity is None else f"sparsity {formats.percent(model.sparsity)}"
    value = formats.metric_value(test.metric, model.average.mean, model.average.error or None, unit=test.unit)
    return f"{name}\n{what}: {value}\n{formats.significant(model.bytes / _MEGABYTE)} MB, {model.bits:.2f} bits a weight"


def _above(line: Series, floor: float) -> Series:
    if line.band is None:
        return line
    low, high = line.band
    band = ([max(value, floor) for value in low], list(high))
    return Series(line.name, line.kind, line.x, line.y, line.style, line.hover, band=band)


def cost_charts(content: Comparison) -> list[Chart]:
    """Horizontal bars: mean time of a cell by stage, stacked; and the highest memory of a cell."""
    names = [method.shown for method in content.methods]
    cells = [content.of(method.name) for method in content.methods]
    charts = []
    stages = []
    totals = [mean([cell.total_seconds for cell in own]) for own in cells]
    unit, one = formats.time_unit(max((total for total in totals if total is not None), default=0.0))
    for index, stage in enumerate(content.stages):
        values = [mean([cell.seconds.get(stage) for cell in own]) for own in cells]
        hover = [f"{n}\n{stage}: {formats.duration(value)}" for n, value in zip(names, values, strict=True)]
        bars = [None if value is None else value / one for value in values]
        stages.append(Series(stage, "bar", names, bars, style(index), hover))
    if stages:
        charts.append(
            Chart(
                caption="Mean time of a cell by stage; importance is measured once per seed and shared",
                description="Mean time of a cell: "
                + "; ".join(f"{n} {formats.duration(total)}" for n, total in zip(names, totals, strict=True))
                + ".",
                x=Axis(unit),
                y=Axis(""),
                series=stages,
                horizontal=True,
                stacked=True,
            )
        )
    for title, field in (("Peak memory", "peak_memory_bytes"), ("Peak GPU memory", "peak_cuda_bytes")):
        peaks = [max((getattr(cell, field) or 0 for cell in own), default=0) for own in cells]
        if not any(peaks):
            continue
        words = [f"{n} {formats.size(peak) if peak else formats.MISSING}" for n, peak in zip(names, peaks, strict=True)]
        hover = [word.replace(f"{n} ", f"{n}\n", 1) for n, word in zip(names, words, strict=True)]
        charts.append(
            Chart(
                caption=title,
                description=f"{title}: {'; '.join(words)}.",
                x=Axis("GB"),
                y=Axis(""),
                series=[Series(title, "bar", names, [peak / _GIGABYTE for peak in peaks], style(0), hover)],
                horizontal=True,
            )
        )
    return charts


def tower_charts(content: Comparison) -> list[Chart]:
    """One plot per tower: its sparsity minus the target, one line per method."""
    charts = []
    apart = [value - cell.sparsity for cell in content.cells for value in cell.towers.values() if value is not None]
    if not apart:
        return []
    low, high = min(*apart, -_LEAST), max(*apart, _LEAST)
    limits = low - 0.1 * (high - low), high + 0.1 * (high - low)
    for tower in content.towers:
        series = []
        for index, method in enumerate(content.methods):
            points = [(s, mean([c.towers.get(tower) for c in content.of(method.name, s)])) for s in content.sparsities]
            known = [(s, value) for s, value in points if value is not None]
            if known:
                hover = [f"{method.shown}\n{formats.percent(v)} of {tower} at {formats.percent(s)}" for s, v in known]
                x, y = [s for s, _ in known], [value - s for s, value in known]
                series.append(Series(method.shown, "line", x, y, style(index), hover))
        charts.append(
            Chart(
                caption=tower,
                description=f"Sparsity of {tower} less the target under {len(series)} methods at each target sparsity.",
                x=Axis("target sparsity", percent=True, ticks=content.sparsities),
                y=Axis("sparsity less target", percent=True, limits=limits),
                series=series,
                rules=[Rule(0.0, "the target", 2)],
            )
        )
    return charts


def draw_comparison(folder: Path | str) -> None:
    """Writes ``quality`` and ``bytes`` (a panel for each test) and ``cost`` from ``compare.json``, as PNG and SVG.

    Raises:
        InvalidOption: the folder holds no ``compare.json``, or it is broken.
        StorageError: a file can't be written.
    """
    from ecoflap.report.charts.static import picture, save

    content = read_comparison(folder)
    found = [quality_chart(content, test) for test in content.each_test]
    quality = [[chart for chart in found if chart is not None]]
    stored = [chart for test in content.each_test if (chart := bytes_chart(content, test)) is not None]
    seeds = len(content.seeds)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "± one standard error of the test"
    title = formats.shortened(place_name(content.model or "embedded VLM"), 24)
    drawings = (
        ("quality", quality, f"{title}: {spread}"),
        ("bytes", [stored], f"{title}: {spread}"),
        ("cost", [cost_charts(content)], title),
    )
    for name, rows, words in drawings:
        if any(rows):
            save(picture(rows, words), Path(folder) / name)
