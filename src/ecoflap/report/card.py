"""Writes model cards: the README.md of a pruned model, in the Hub's format, from a run directory or from Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult

from ecoflap.errors import InvalidOption
from ecoflap.evaluation import TASKS, Task
from ecoflap.pruning.registry import CRITERIA, DEFAULT, is_global
from ecoflap.report.card_page import Card, Row, Step, base_model, processor_class, write_readme
from ecoflap.report.data import Metrics, RunData, read_run
from ecoflap.report.finetune_page import ChannelsRecord, FinetuneMetrics, TrainingRecord, read_finetune
from ecoflap.report.places import place_name, without_places
from ecoflap.report.quality import OtherMetric, PairedDifference, Quality
from ecoflap.run.citations import RECOVERY_PAPERS, citations
from ecoflap.run.finetune.recipe import EMBEDDED
from ecoflap.run.names import TRAIN
from ecoflap.run.recipe import Recipe, idle_fields
from ecoflap.support import formats

if TYPE_CHECKING:
    from ecoflap.api import PruneResult

MODEL = "model"


def write_card(run: str | Path) -> Path:
    """Write ``README.md`` into the model folder of a run with ``metrics.json``, from the run's files; return its path.

    The same files give the same bytes: it contains no times. Paths on this machine are cut to their last part.

    Raises:
        InvalidOption: it is no run directory, has no model or metrics yet, or a file is broken.
        StorageError: the card can't be written; an earlier file is unchanged.
    """
    data = read_run(run)
    folder = data.path / MODEL
    if not folder.is_dir() or data.metrics is None:
        raise InvalidOption(f"{data.path} is not finished: 'ecoflap prune --resume' with its options goes on with it")
    make = _of_finetune if (data.recipe or {}).get(TRAIN) else _of_run
    return write_readme(folder, make(data, processor_class(folder)))


def write_model_card(
    folder: str | Path,
    result: PruneResult,
    *,
    base: str | None = None,
    criterion: str = DEFAULT,
    quality: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``README.md`` into ``folder``, which has a model of :func:`ecoflap.prune`, saved by :func:`ecoflap.save`.

    Args:
        base: the source of the dense model: a Hub id or a folder.
        criterion: of the pruning.
        quality: by task, ``{"metric", "value"}`` of the pruned model, with ``"dense"`` (the dense model's value),
            ``"stderr"`` and ``"n"`` if known; default: "not measured".

    Returns:
        The card's path.

    Raises:
        InvalidOption: ``folder`` holds no model.
        StorageError: the card can't be written.
    """
    from ecoflap.run.provenance import sparsity_summary
    from ecoflap.run.versions import versions

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidOption(f"{folder} holds no model: save it there first, with ecoflap.save")
    name = str(base) if base is not None else type(result.model).__name__
    found = base_model(name)
    scores = result.importance
    given = quality or {}
    pruned = {task: Quality(**{k: v for k, v in row.items() if k != "dense"}) for task, row in given.items()}
    dense = {task: Quality(metric=str(row["metric"]), value=row.get("dense")) for task, row in given.items()}
    recipe = {"criterion": criterion, "pattern": result.allocation.pattern}
    sparsity = sparsity_summary(result.anatomy, result.allocation)
    steps = [*_steps(scores.method if scores else None, scores.settings if scores else {}, recipe)]
    card = Card(
        title=_title(found.name, sparsity["prunable"]),
        base=found,
        model_class=type(result.model).__name__,
        processor=processor_class(folder),
        sparsity=sparsity,
        steps=steps,
        tags=_tags(criterion),
        rows=[*_rows(dense, pruned, {})],
        results=[*_results(pruned, {}, {})],
        environment=versions(),
    )
    return write_readme(folder, card)


def _of_run(run: RunData, processor: str | None) -> Card:
    metrics = run.metrics
    assert metrics is not None
    said = run.recipe or {}
    order = [*(name for name in Recipe.model_fields if name in said), *sorted(set(said) - set(Recipe.model_fields))]
    recipe = {name: without_places(said[name], name) for name in order if name not in idle_fields(said)}
    found = base_model(said.get("model"))
    data = _data_of(metrics.dense, metrics.pruned)
    kinds = {str(entry.get("name")): str(entry.get("task")) for entry in recipe.get("evaluations") or ()}
    importance = run.importance
    steps = _steps(importance.method if importance else None, importance.settings if importance else {}, recipe)
    return Card(
        title=_title(found.name, metrics.sparsity.prunable),
        base=found,
        model_class=str(metrics.environment.get("model_class", "AutoModel")),
        processor=processor,
        sparsity=metrics.sparsity.model_dump(),
        steps=[*steps],
        tags=_tags(str(recipe.get("criterion", ""))),
        rows=[*_paired(_rows(metrics.dense, metrics.pruned, data), metrics, metrics.pruned, metrics.baseline)],
        results=[*_results(metrics.pruned, data, kinds)],
        calibration=_calibration(metrics.calibration),
        recipe=recipe,
        environment=metrics.environment,
    )


def _data_of(*parts: Mapping[str, Quality]) -> dict[str, str]:
    """The last part of the path of each task's test data, by task."""
    return {
        task: place_name(str(place))
        for part in parts
        for task, result in part.items()
        if (place := (result.settings or {}).get("data"))
    }


def _of_finetune(run: RunData, processor: str | None) -> Card:
    """The card of a fine-tuned model, with its results and those of the dense model."""
    recipe, metrics = read_finetune(run.path)
    dense = recipe.get("dense")
    found = base_model(None if dense == EMBEDDED else dense or recipe.get("model"))
    data = _data_of(metrics.dense, metrics.finetuned)
    shown = {name: without_places(value, name) for name, value in recipe.items()}
    training = metrics.training
    kinds = {str(entry.get("name")): str(entry.get("task")) for entry in recipe.get("evaluations") or ()}
    return Card(
        title=f"{found.name}, {formats.percent(metrics.sparsity.prunable)} "
        + ("of its prunable weights removed by UPop" if metrics.channels else "sparse and fine-tuned"),
        base=found,
        model_class=str(metrics.environment.get("model_class", "AutoModel")),
        processor=processor,
        sparsity=metrics.sparsity.model_dump(),
        steps=[*_training_steps(shown, training, metrics.channels)],
        tags=["ecoflap", "pruned", *(["structured", "upop"] if metrics.channels else ["sparse"]), "fine-tuned"],
        rows=[*_paired(_rows(metrics.dense, metrics.finetuned, data), metrics, metrics.finetuned, {})],
        results=[*_results(metrics.finetuned, data, kinds)],
        recipe=shown,
        environment=metrics.environment,
        trained=True,
    )


def _training_steps(
    recipe: Mapping[str, Any], training: TrainingRecord, channels: ChannelsRecord | None
) -> Iterator[Step]:
    if channels is None:
        yield Step("Zeros", f"those of {recipe.get('model')}, kept in training")
    else:
        yield Step("Channels", "of attentions and feed-forward networks, by UPop's search while the model was trained")
        yield Step("Saved", channels.saved)
        for kind in dict.fromkeys(row.kind for row in channels.groups):
            rows = [row for row in channels.groups if row.kind == kind]
            yield Step(f"Kept, {kind}", ", ".join(f"{row.name} {row.kept} of {row.width}" for row in rows))
    what = "a masked low-rank update of the pruned layers" if recipe.get("tune") == "lora" else "all weights"
    source = place_name(training.source) if training.source else "its data"
    yield Step("Training", f"{what}, {training.best:,} steps on {training.samples:,} samples of {source}")
    if recipe.get("distill") or recipe.get("distill_hidden"):
        yield Step("Teacher", "the dense model's outputs beside the loss")


def _title(name: str, sparsity: float | None) -> str:
    return f"{name}, pruned to {formats.percent(sparsity)} sparsity"


def _tags(criterion: str) -> list[str]:
    return [*dict.fromkeys(tag for tag in ("ecoflap", "pruning", "pruned", "sparse", criterion) if tag)]


def _steps(method: str | None, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[Step]:
    """The steps of the method: sparsities of the layers, choice of weights, tokens of the statistics."""
    if recipe.get("pruned"):
        yield Step("Zeros", f"those of {place_name(str(recipe['pruned']))}")
        yield _recovered()
        return
    if recipe.get("criterion") in CRITERIA and is_global(str(recipe["criterion"])):
        within = "each tower" if recipe.get("budget") == "tower" else "the whole model"
        yield Step("Sparsity of each layer", f"as the criterion makes it, over the weights of {within}")
    elif recipe.get("allocation"):
        yield Step("Sparsity of each layer", f"from the file {recipe['allocation']}")
    elif method == "uniform" or method is None:
        yield Step("Sparsity of each layer", "the same for all layers")
    else:
        rule = str(settings.get("rule", "proportional"))
        variant = settings.get("variant")
        named = f"importance {method}" + (f", variant {variant}" if variant else "")
        how = f"{named}; groups: {recipe.get('granularity', 'block')}; rule: {recipe.get('rule') or rule}"
        yield Step("Sparsity of each layer", how, citations(method, str(variant), recipe.get("rule") or rule))
    if recipe.get("search"):
        yield Step("Then", "the shares improved by measuring the pruned model")
    criterion = str(recipe.get("criterion", ""))
    pattern = recipe.get("pattern") or "unstructured"
    yield Step("Weights within a layer", f"criterion {criterion}, {pattern}", citations(criterion))
    if recipe.get("recover"):
        yield _recovered()
    tokens = str(recipe.get("tokens") or "all")
    if tokens != "all":
        yield Step("Tokens that the criterion's statistics count", tokens, citations(tokens))


def _recovered() -> Step:
    how = "fitted to the dense model's outputs by least squares, the zeros kept"
    return Step("Weights that are not zero", how, citations(*RECOVERY_PAPERS))


def _rows(dense: Mapping[str, Quality], pruned: Mapping[str, Quality], data: Mapping[str, str]) -> Iterator[Row]:
    nothing = Quality(metric="")
    for task in dict.fromkeys([*dense, *pruned]):
        before, after = dense.get(task, nothing), pruned.get(task, nothing)
        whole = after.metric or before.metric
        unit = after.unit if after.metric else before.unit
        yield _row(task, data.get(task, ""), whole, unit, after.n or before.n, before, after)
        for other in dict.fromkeys([*before.others, *after.others]):
            values = before.others.get(other, OtherMetric()), after.others.get(other, OtherMetric())
            yield _row("", "", other, unit, None, *values)


def _paired(
    rows: Iterable[Row], metrics: Metrics | FinetuneMetrics, own: Mapping[str, Quality], baseline: Mapping[str, Quality]
) -> Iterator[Row]:
    """The rows, with paired changes from the dense model and the uniform baseline in each task's first row.

    Args:
        own: the quality of the card's model.
        baseline: that of the uniform model; empty if there is none.
    """
    nothing = Quality(metric="")
    pairs: Mapping[str, PairedDifference] = {}
    dense = pruned = nothing
    for row in rows:
        if not row.task:  # a further metric of the previous task
            pair = PairedDifference.of_other(pairs.get("dense"), row.metric)
            yield row if pair is None else replace(row, change=_other_change(row.metric, dense, pruned, pair))
            continue
        pairs = metrics.paired.get(row.task, {})
        dense, pruned = metrics.dense.get(row.task, nothing), own.get(row.task, nothing)
        change = formats.metric_change(pruned.metric, dense.value, pruned.value, unit=pruned.unit)
        change += formats.paired_change(pruned.metric, pairs.get("dense"), dense.value, unit=pruned.unit)
        value = baseline.get(row.task, nothing).value
        uniform = formats.against_uniform(pruned.metric, pairs.get("baseline"), value, pruned.value, unit=pruned.unit)
        yield replace(row, change=change if "dense" in pairs else "", uniform=uniform)


def _other_change(metric: str, dense: Quality, pruned: Quality, pair: PairedDifference) -> str:
    nowhere = OtherMetric()
    before, after = (one.others.get(metric, nowhere).value for one in (dense, pruned))
    change = formats.metric_change(metric, before, after, unit=pruned.unit)
    return change + formats.paired_change(metric, pair, before, unit=pruned.unit)


def _row(
    task: str,
    data: str,
    metric: str,
    unit: str | None,
    n: int | None,
    dense: Quality | OtherMetric,
    pruned: Quality | OtherMetric,
) -> Row:
    shown = [formats.metric_value(metric, part.value, part.stderr, unit=unit) for part in (dense, pruned)]
    return Row(task, data, metric, "" if n is None else formats.integer(n), *shown)


def _results(pruned: Mapping[str, Quality], data: Mapping[str, str], kinds: Mapping[str, str]) -> Iterator[EvalResult]:
    """The results for the Hub: finite numbers of this model."""
    for task, quality in pruned.items():
        kind = quality.hub_type or _hub_type(kinds.get(task, task))
        where = data.get(task, task)
        values = {quality.metric: quality.value, **{name: other.value for name, other in quality.others.items()}}
        for metric, value in values.items():
            if value is not None:
                slug = re.sub(r"[^\w/.-]+", "-", where).strip("-")
                yield EvalResult(kind, slug, where, metric, value, task_name=task, metric_name=metric)


def _hub_type(task: str) -> str:
    """The Hub's name of a task, for runs whose results don't have it."""
    known: Any = TASKS.get(task) if task in TASKS else Task
    return str(known.hub_type)


def _calibration(record: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not record:
        return None
    source = record.get("source")
    return {
        "samples": len(record["indices"]) if isinstance(record.get("indices"), list) else 0,
        "source": place_name(str(source)) if source else "the bundled calibration set",
        "objective": record.get("objective"),
    }
