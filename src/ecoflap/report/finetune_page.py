"""Writes ``report.html`` of a fine-tuning from its files: losses, and quality dense, pruned and fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ecoflap.errors import InvalidOption
from ecoflap.report import records
from ecoflap.report.charts.chart import Axis, Chart, Rule, Series, Style
from ecoflap.report.data import METRICS, RECIPE, Sparsity, Stage
from ecoflap.report.html import Plots, environment
from ecoflap.report.places import place_name, without_places
from ecoflap.report.quality import OtherMetric, PairedDifference, Quality
from ecoflap.report.reading import Content, Count, Finite, read_mapping, read_model
from ecoflap.run.manifest import Manifest
from ecoflap.run.names import REPORT
from ecoflap.support import formats
from ecoflap.support.files import write_text

MODELS = {"dense": "Dense", "pruned": "Pruned", "finetuned": "Fine-tuned"}
Point = tuple[Count, Finite]


class TrainingRecord(Content):
    """The outcome of the training, see :class:`ecoflap.run.finetune.train.Training`; ``best`` 0: the weights stayed."""

    steps: Count = 0
    planned: Count = 0
    best: Count = 0
    losses: list[Point] = []
    held_out: list[Point] = []
    samples: Count = 0
    held_out_samples: Count = 0
    objective: str = ""
    source: str = ""


class ChannelRow(Content):
    """One attention or feed-forward network: number of units before, and of those that stay."""

    name: str = ""
    tower: str = ""
    kind: str = ""
    width: Count = 0
    kept: Count = 0


class ChannelsRecord(Content):
    """The record of the channels, see :func:`ecoflap.run.finetune.upop.channels_record`.

    Attributes:
        config: entries of the saved model's configuration, with old and new size.
        search: (step, training loss) of the search.
    """

    groups: list[ChannelRow] = []
    config: dict[str, tuple[Count, Count]] = {}
    parameters: dict[str, Count] = {}
    search: list[Point] = []

    @property
    def saved(self) -> str:
        """How the model is stored, as text."""
        if not self.config:
            return "with zeros in the removed channels: its configuration can't express the sizes"
        sizes = ", ".join(f"{entry} {old} → {new}" for entry, (old, new) in self.config.items())
        before, after = (formats.integer(self.parameters.get(name)) for name in ("dense", "saved"))
        return f"smaller: {sizes}; {after} of {before} parameters. Zeros fill the other removed channels"


class FinetuneMetrics(Content):
    """``metrics.json`` of a fine-tuning."""

    dense: dict[str, Quality] = {}
    pruned: dict[str, Quality] = {}
    finetuned: dict[str, Quality] = {}
    paired: dict[str, dict[str, PairedDifference]] = {}
    sparsity: Sparsity = Sparsity()
    channels: ChannelsRecord | None = None
    training: Annotated[TrainingRecord, Field(default_factory=TrainingRecord)]
    stages: list[Stage] = []
    environment: dict[str, Any] = {}


@dataclass(frozen=True)
class Line:
    """One row of the quality table: its values in the order of :data:`MODELS`, and the gain over the pruned model."""

    label: str
    values: tuple[str, ...]
    gain: str


@dataclass(frozen=True)
class Test:
    """One test, formatted."""

    title: str
    n: str
    lines: list[Line]


def read_finetune(folder: Path | str) -> tuple[dict[str, Any], FinetuneMetrics]:
    """Recipe and metrics of a complete fine-tuning.

    Raises:
        InvalidOption: it is missing or not complete, or a file is broken.
    """
    path = Path(folder)
    recipe, metrics = read_mapping(path / RECIPE), read_model(path / METRICS, FinetuneMetrics)
    if recipe is None or metrics is None:
        raise InvalidOption(f"{path} is not finished: 'ecoflap finetune --resume' with its options goes on with it")
    return recipe, metrics


def tests(metrics: FinetuneMetrics) -> Iterator[Test]:
    """The tests of all models, in order."""
    nothing = Quality(metric="")
    for name, tuned in metrics.finetuned.items():
        models = [getattr(metrics, model).get(name, nothing) for model in MODELS]
        metric, unit = tuned.metric, tuned.unit
        pair = metrics.paired.get(name, {}).get("pruned")
        whole = _line("all", metric, unit, [(q.value, q.stderr) for q in models])
        gain = whole.gain + formats.paired_change(metric, pair, models[1].value, unit=unit)
        lines = [Line(whole.label, whole.values, gain)]
        for other in tuned.others:
            found = [q.others.get(other, OtherMetric()) for q in models]
            line = _line(other, other, unit, [(one.value, one.stderr) for one in found])
            gain = formats.paired_change(other, PairedDifference.of_other(pair, other), found[1].value, unit=unit)
            lines.append(Line(line.label, line.values, line.gain + gain))
        for group in tuned.by_group or {}:
            line = _line(tuned.group_label(group), metric, unit, [q.of_group(group) for q in models])
            found_pair, before = PairedDifference.of_group(pair, group), models[1].of_group(group)[0]
            gain = line.gain + formats.paired_change(metric, found_pair, before, unit=unit)
            lines.append(Line(line.label, line.values, gain))
        yield Test(formats.task_title(name, metric), formats.integer(tuned.n), lines)


def _line(label: str, metric: str, unit: str | None, values: Sequence[tuple[float | None, float | None]]) -> Line:
    shown = tuple(formats.metric_value(metric, *value, unit=unit) for value in values)
    return Line(label, shown, formats.metric_change(metric, values[1][0], values[2][0], unit=unit))


def loss_chart(training: TrainingRecord) -> Chart | None:
    """Training and held-out loss by step; None if nothing was logged."""
    rows = {"training": training.losses, "held out": training.held_out}
    series = [
        Series(name, "line", [step for step, _ in points], [loss for _, loss in points], Style(f"c{place}", 0, place),
               [f"{name}\nstep {step}: {formats.significant(loss, 4)}" for step, loss in points])
        for place, (name, points) in enumerate(rows.items(), 1) if points
    ]  # fmt: skip
    values = [loss for points in rows.values() for _, loss in points]
    if not values:
        return None
    low, high = min(values), max(values)
    steps = max(1, training.steps)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    best = dict(training.held_out).get(training.best)
    note = "" if best is None else f"; the best held-out loss is {formats.significant(best, 4)}, at {training.best}"
    return Chart(
        caption="Loss by step",
        description=f"Training and held-out loss over {training.steps} steps{note}.",
        x=Axis("step", limits=(-0.02 * steps, 1.02 * steps)),  # space for the first and last marker
        y=Axis("loss", limits=(low - margin, high + margin)),
        series=series,
        rules=[] if best is None else [Rule(best, f"kept: step {training.best}", 1)],
        wide=True,
    )


def write_finetune(folder: Path | str) -> Path:
    """Write ``report.html`` into the folder of a fine-tuning from its other files; return its path.

    Raises:
        InvalidOption: as :func:`read_finetune`.
        StorageError: the page could not be written; an older page is unchanged.
    """
    path = Path(folder) / REPORT
    content = render(*read_finetune(folder))
    with Manifest(Path(folder)).writing(REPORT):
        write_text(path, content)
    return path


def render(recipe: Mapping[str, Any], metrics: FinetuneMetrics) -> str:
    """The page as text."""
    plots, recipe = Plots(), without_places(recipe)
    training = metrics.training
    chart = loss_chart(training)
    stages = [stage.seconds for stage in metrics.stages if stage.seconds is not None]
    return (
        environment()
        .get_template("finetune.html.j2")
        .render(
            model=str(recipe.get("model") or ""),
            recipe=recipe,
            metrics=metrics,
            training=training.model_copy(update={"source": training.source and place_name(training.source)}),
            models=list(MODELS.values()),
            tests=list(tests(metrics)),
            loss_panels=plots.group("loss", [chart] if chart else []),
            seconds=sum(stages) if stages else None,
            peak=max((s.peak_memory_bytes for s in metrics.stages if s.peak_memory_bytes is not None), default=None),
            command_name=getattr(records.kind_of(recipe), "title", "finetune"),
            options=list(records.options(recipe)),
            records=list(records.records("", records.environment(recipe, metrics.environment))),
            command=records.reproduce(recipe, "tuned/again"),
            **plots.context(),
        )
    )
