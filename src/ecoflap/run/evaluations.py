"""Runs the evaluations of a recipe: each with its task, data and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ecoflap.data.class_names import class_names, class_templates
from ecoflap.errors import CalibrationError, EcoflapError, InvalidOption
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    from ecoflap.evaluation import Task, TaskResult
    from ecoflap.model.checkpoint import Checkpoint
    from ecoflap.run.recipe import Recipe

OptionValue = float | int | bool | str


class Evaluation(BaseModel):
    """One entry of a recipe's ``evaluations``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(description="vqa, captioning, ...: as --task.")
    name: str = Field("", description="Of the result; default: the task.")
    test: str | None = Field(None, description="Test data: as --test.")
    columns: dict[str, str] = Field(default_factory=dict, description="As --test-columns.")
    prompt: str | None = Field(None, description="As --test-prompt.")
    image_folder: str | None = Field(None, description="As --test-image-folder.")
    samples: int | None = Field(None, ge=1, description="As --test-samples.")
    sequence_length: int | None = Field(None, ge=2, description="Instead of the recipe's.")
    options: dict[str, OptionValue] = Field(default_factory=dict, description="As --task-option.")
    classes: tuple[str, ...] | None = Field(None, description="As --classes.")
    class_prompts: tuple[str, ...] | None = Field(None, description="As --class-prompts.")

    def reading(self) -> dict[str, Any]:
        """How the test data is read: options of :class:`~ecoflap.data.samples.SampleReader`."""
        return {"columns": self.columns or None, "prompt_template": self.prompt, "image_folder": self.image_folder}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for name in values:
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"it may have {', '.join(cls.model_fields)}"
                raise InvalidOption(f"evaluations: unknown field '{name}': {hint}")
        return {"name": values.get("task", ""), **values}

    @field_validator("classes", "class_prompts", mode="before")
    @classmethod
    def _wrap_single(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        from ecoflap.evaluation import TASKS

        return TASKS.check(name)


def tasks_of(recipe: Recipe) -> tuple[str, ...]:
    """Tasks without ``evaluations``: the named ones, else one that fits ``test``; VQA for the embedded model."""
    if recipe.task is not None:
        return recipe.task
    if recipe.test is not None:
        return ("perplexity",) if _is_text(recipe.test) else ("vqa",)
    return ("vqa",) if recipe.model is None else ()


def _is_text(source: str) -> bool:
    """Whether a source is plain text: a file by its name, a folder by its content."""
    from ecoflap.data.formats.text import COMPRESSED, SUFFIXES, TextFiles
    from ecoflap.data.sources import open_source

    path = Path(source).expanduser()
    if path.is_dir():
        try:
            return isinstance(open_source(source), TextFiles)
        except CalibrationError:  # raised again when the task opens it
            return False
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower() in SUFFIXES


def evaluations_of(recipe: Recipe) -> tuple[Evaluation, ...]:
    """All evaluations with all fields: one entry per task, or the recipe's ``evaluations``.

    With ``evaluations``, ``task`` selects some of them by name, ``test_samples`` is a limit for each, and
    ``task_options``, ``classes`` and ``class_prompts`` are the defaults of each entry.
    """
    if recipe.evaluations is None:
        entries = [
            Evaluation.model_validate(
                {
                    "task": task,
                    "test": recipe.test,
                    "columns": recipe.test_columns,
                    "prompt": recipe.test_prompt,
                    "image_folder": recipe.test_image_folder,
                    "samples": recipe.test_samples,
                }
            )
            for task in tasks_of(recipe)
        ]
    else:
        entries = [entry for entry in recipe.evaluations if recipe.task is None or entry.name in recipe.task]
    return tuple(_completed(entry, recipe) for entry in entries)


def _completed(entry: Evaluation, recipe: Recipe) -> Evaluation:
    limits = [limit for limit in (entry.samples, recipe.test_samples) if limit is not None]
    accepted = options_of(entry.task) if recipe.task_options else {}
    general = {name: value for name, value in recipe.task_options.items() if name in accepted}
    return entry.model_copy(
        update={
            "samples": min(limits, default=None),
            "sequence_length": entry.sequence_length or recipe.sequence_length,
            "options": {**general, **entry.options},
            "classes": entry.classes or recipe.classes,
            "class_prompts": entry.class_prompts or recipe.class_prompts,
        }
    )


def options_of(task: str) -> dict[str, Any]:
    """The types of a task's options by name; they are the fields of its class. Raises UnknownName: no such task."""
    cls: Any = _task(task)
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def takes(task: str) -> tuple[str, ...]:
    """Which fields of a test the task reads, see :class:`ecoflap.evaluation.Task`."""
    return _task(task).takes


def _task(name: str) -> type[Task]:
    from ecoflap.evaluation import TASKS

    found: Any = TASKS.get(name)
    return found  # type: ignore[no-any-return]


def check_evaluations(recipe: Recipe) -> tuple[Evaluation, ...]:
    """:func:`evaluations_of`, with options and class files checked without a model.

    Raises:
        InvalidOption: a task has no such option or does not accept its value, or no task uses a field that is set.
    """
    entries = evaluations_of(recipe)
    known = {name: None for entry in entries for name in options_of(entry.task)}
    tasks = ", ".join(f"'{task}'" for task in dict.fromkeys(entry.task for entry in entries))
    for name in recipe.task_options:
        if name not in known:
            if not entries:
                raise InvalidOption(f"task option {name} is given, but nothing is evaluated: give --task too")
            raise InvalidOption(_unknown_option(name, list(known), f"task {tasks}"))
    class_names(recipe.classes), class_templates(recipe.class_prompts)
    if recipe.evaluations is None:
        for field, argument in _TEST_FIELDS.items():
            if getattr(recipe, field) and not any(argument in _task(entry.task).takes for entry in entries):
                taker = f"task {tasks} does not take it" if entries else "nothing is evaluated: give --task too"
                raise InvalidOption(f"{field} is given, but {taker}")
    for entry in entries:
        _check_entry(entry, recipe)
    return entries


_TEST_FIELDS = {"test_columns": "columns", "test_prompt": "prompt_template", "test_image_folder": "image_folder"}
_ENTRY_FIELDS = {
    "columns": "columns", "prompt": "prompt_template", "image_folder": "image_folder", "classes": "classes",
    "class_prompts": "class_prompts",
}  # fmt: skip


def _check_entry(entry: Evaluation, recipe: Recipe) -> None:
    accepted = options_of(entry.task)
    where = "" if recipe.evaluations is None else f"evaluation '{entry.name}': "
    for name, value in entry.options.items():
        if name not in accepted:
            raise InvalidOption(where + _unknown_option(name, list(accepted), f"task '{entry.task}'"))
        _typed(name, value, accepted[name], where)
    own = next((e for e in recipe.evaluations or () if e.name == entry.name), None)
    for field, argument in _ENTRY_FIELDS.items():
        if own is not None and getattr(own, field) and argument not in _task(entry.task).takes:
            raise InvalidOption(f"{where}task '{entry.task}' takes no {field}")
    class_names(entry.classes), class_templates(entry.class_prompts)


def _unknown_option(name: str, known: list[str], owner: str) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{owner} has no option '{name}': {hint}{'choose from ' + ', '.join(known) if known else 'it has none'}"


def _typed(name: str, value: OptionValue, kind: Any, where: str) -> Any:
    """``value`` in the type ``kind``."""
    if isinstance(value, bool) and "bool" not in str(kind):
        raise InvalidOption(f"{where}task option {name}={value}: the value can't be true or false")
    try:
        wanted = TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True))
        return wanted.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input ")
        raise InvalidOption(f"{where}task option {name}={value}: it {reason}") from error


def rehearse(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Run each evaluation on one sample, so that none can stop a run half-way.

    Raises:
        EcoflapError: one line with the faults of all that fail.
    """
    failures: list[EcoflapError] = []
    entries = check_evaluations(recipe)
    for entry in entries:
        try:
            evaluate(checkpoint, entry.model_copy(update={"samples": 1}), recipe, Silent())
        except EcoflapError as error:
            failures.append(error if recipe.evaluations is None else type(error)(f"evaluation '{entry.name}': {error}"))
        except UNFIT as error:
            failures.append(unfit(error, entry, checkpoint))
    if failures:
        more = "" if len(failures) == 1 else f"{len(failures)} of {len(entries)} evaluations can't run. "
        raise type(failures[0])(more + "; ".join(map(str, failures))) from failures[0]


# Errors of models and processors with inputs that they can't take, or with damaged settings.
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def unfit(error: Exception, entry: Evaluation, checkpoint: Checkpoint) -> EcoflapError:
    """An error that says that the test can't be run on the model, which raised ``error``."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    model, data = type(checkpoint.model).__name__, entry.test or "its data"
    found = InvalidOption(
        f"task '{entry.task}' can't work on {model} with {data} ({message}): "
        "choose another --task or --test, or repair the model's settings; ECOFLAP_TRACEBACK=1 shows where"
    )
    found.__cause__ = error
    return found


def rows_of_a_test(recipe: Recipe) -> int:
    """Samples in a forward of an evaluation. The embedded model gets more: it is so small that calls take most time."""
    return recipe.test_batch_size or (recipe.batch_size if recipe.model is not None else max(recipe.batch_size, 32))


def evaluate(
    checkpoint: Checkpoint, entry: Evaluation, recipe: Recipe, progress: Progress, workers: Workers = ALONE
) -> TaskResult:
    """Run one evaluation of :func:`evaluations_of`; several workers share its samples if the task supports it."""
    import torch

    from ecoflap.evaluation import TestData
    from ecoflap.model import compute
    from ecoflap.model.read_elsewhere import with_weights

    cls = _task(entry.task)
    dtype = workers.from_first(lambda: compute.settled(recipe.compute_dtype, checkpoint.model))
    asked: dict[str, Any] = {
        **entry.reading(),
        "classes": class_names(entry.classes),
        "class_prompts": class_templates(entry.class_prompts),
    }
    test = TestData(
        data=entry.test,
        samples=entry.samples,
        batch_size=rows_of_a_test(recipe),
        sequence_length=entry.sequence_length,
        window_start=recipe.window_start,
        seed=recipe.seed,
        progress=progress,
        workers=workers,
        **{name: value for name, value in asked.items() if name in cls.takes},
    )
    task, model = _made(entry), checkpoint.model
    with torch.no_grad(), compute.computing_in(model, dtype), _naming_the_guess(entry, recipe):
        result = with_weights(model, lambda: task.run(model, checkpoint.processor, test))
    return replace(result, unit=task.unit, better=task.better, hub_type=task.hub_type)


def check_sources(recipe: Recipe) -> None:
    """Open each test's data before a model is loaded, and check that its columns fit the task.

    Raises:
        CalibrationError: it can't be read, is empty, or lacks a column that the task needs.
    """
    from ecoflap.data.samples import SampleReader

    for entry in evaluations_of(recipe):
        if entry.test is None or "columns" not in takes(entry.task):
            continue
        with _naming_the_guess(entry, recipe):
            _made(entry).check_source(SampleReader(entry.test, samples=1, seed=recipe.seed, **entry.reading()))


def _made(entry: Evaluation) -> Task:
    kinds = options_of(entry.task)
    return _task(entry.task)(**{name: _typed(name, value, kinds[name], "") for name, value in entry.options.items()})


@contextmanager
def _naming_the_guess(entry: Evaluation, recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (CalibrationError, InvalidOption) as error:
        if recipe.evaluations is not None or recipe.task is not None or recipe.test is None:
            raise
        raise type(error)(f"{error} (no task is named, so '{entry.task}' was tried: --task NAME)") from error
