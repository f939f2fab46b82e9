"""Makes command-line options from the fields of the recipe, which have names, types, defaults and help."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ecoflap.errors import InvalidOption
from ecoflap.run.commands import find_own_modules
from ecoflap.run.recipe import OPTIONS, Recipe, flag_of
from ecoflap.support.registry import number

# The heading of --help for each option.
PANELS: dict[str, tuple[str, ...]] = {
    "Grid": ("methods", "sparsities", "seeds", "values"),
    "Training": (
        "train", "train_samples", "validation", "held_out", "tune", "rank", "epochs", "learning_rate", "weight_decay",
        "warmup", "accumulate", "evaluate_every", "patience", "dense", "distill", "distill_hidden", "temperature",
        "training_options", "search_epochs", "update_every",
    ),
    "Model": (
        "device", "device_map", "max_memory", "dtype", "compute_dtype", "trust_remote_code", "include", "exclude",
        "towers",
    ),
    "Sparsity": (
        "sparsity", "max_sparsity", "min_sparsity", "granularity", "aggregate", "budget", "tower_sparsity",
        "rule", "spread", "search", "search_options", "allocation",
    ),
    "Importance (stage 1)": ("importance", "importance_options", "importance_samples", "importance_error"),
    "Pruning (stage 2)": (
        "criterion", "criterion_options", "pattern", "compare", "recover", "recover_options", "tokens", "top_tokens",
        "expert_tokens",         "offload_activations",
    ),
    "Calibration": (
        "calibration", "image_folder", "columns", "prompt", "objective", "classes", "class_prompts", "samples",
        "batch_size", "sequence_length", "window_start", "seed",
    ),
    "Evaluation": (
        "task", "task_options", "test", "test_image_folder", "test_columns", "test_prompt", "test_samples",
        "test_batch_size", "baseline",
    ),
}  # fmt: skip

OUTPUT = "Run and output"

_METAVARS = {
    "model": "MODEL",
    "methods": "METHOD,...",
    "sparsities": "FROM:TO:STEP|X,...",
    "seeds": "N,...",
    "values": "FORM,...",
    "importance": "NAME|FILE",
    "importance_options": "NAME=VALUE",
    "tower_sparsity": "TOWER=X",
    "columns": "ROLE=COLUMN",
    "test_columns": "ROLE=COLUMN",
    "task_options": "NAME=VALUE",
    "image_folder": "DIR",
    "test_image_folder": "DIR",
    "classes": "FILE",
    "class_prompts": "TEMPLATE|FILE",
    "allocation": "FILE",
    "criterion": "NAME",
    "tokens": "NAME",
    "criterion_options": "NAME=VALUE",
    "search_options": "NAME=VALUE",
    "recover_options": "NAME=VALUE",
    "rule": "NAME",
    "pattern": "unstructured|N:M",
    "calibration": "SOURCE",
    "train": "SOURCE",
    "validation": "SOURCE",
    "dense": "MODEL",
    "training_options": "NAME=VALUE",
    "test": "SOURCE",
    "prompt": "TEMPLATE",
    "test_prompt": "TEMPLATE",
    "objective": "NAME",
    "task": "NAME",
    "device": "NAME",
    "device_map": "disk|auto|...",
    "max_memory": "DEVICE=AMOUNT",
    "include": "PATTERN",
    "exclude": "PATTERN",
    "towers": "PATTERN",
}


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _option(name: str, alias: str | None, kind_of_recipe: type[Recipe]) -> inspect.Parameter:
    field = kind_of_recipe.model_fields[name]
    annotation = _without_none(field.annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    flag = flag_of(name)
    help_text = field.description or ""
    default = field.get_default(call_default_factory=True)
    # Numbers are passed as text: the recipe parses them, so that a fault has the same message everywhere.
    kind: Any = str | None
    metavar: str | None = _METAVARS.get(name, {int: "N", float: "X"}.get(annotation, "TEXT"))
    if annotation is bool:
        kind, metavar = bool | None, None
        flag = f"{flag}/--no-{flag[2:]}"
    elif origin is typing.Literal:
        metavar = "|".join(arguments)
    elif origin in (dict, tuple):
        kind, help_text = list[str] | None, f"{help_text} May be repeated."
    if isinstance(default, int | float | str) and not isinstance(default, bool):
        help_text = f"{help_text} Default: {default}."
    panel = next(title for title, names in PANELS.items() if name in names)
    # None means "not given", so that a recipe file's value is kept; the help text states the default.
    flags = (flag,) if alias is None else (flag, alias)
    option = typer.Option(*flags, help=help_text, metavar=metavar, show_default=False, rich_help_panel=panel)
    return _parameter(name, Annotated[kind, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_recipe_options(
    *names: str, model: bool = True, aliases: Mapping[str, str] | None = None, recipe: type[Recipe] = Recipe
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options ``names`` (fields of the recipe; by default all except ``model``).

    The command gets a :class:`Recipe` as its first argument, built from the given options and the file ``--recipe``;
    options take precedence.

    Args:
        model: the command also has the argument MODEL and the option ``--recipe``.
        aliases: second names of options, by field.
        recipe: the class of the recipe.
    """
    fields = [name for panel in PANELS.values() for name in panel if name in recipe.model_fields]
    chosen = [name for name in fields if name in names or not names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_parameter(*each) for each in _model(recipe)] if model else []
        parameters += [_option(name, (aliases or {}).get(name), recipe) for name in chosen]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

        def wrapper(**values: Any) -> None:
            recipe_files = values.pop("recipe", None)
            given = {name: values.pop(name) for name in ("model", *chosen) if name in values}
            changes = {
                name: _plain(recipe, name, value) for name, value in given.items() if value is not None and value != []
            }
            built = recipe.load(recipe_files, changes) if recipe_files else recipe.parse(changes, OPTIONS)
            find_own_modules(built.objective)
            command(built, **values)

        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _model(recipe: type[Recipe]) -> list[tuple[str, Any]]:
    """The argument MODEL and the option ``--recipe``, with their annotations."""
    about = recipe.model_fields["model"].description
    optional = "[MODEL]" if "embedded model" in str(about) else "RUN|MODEL"
    files = typer.Option(
        "--recipe",
        metavar="FILE",
        help="YAML with any of these options; those given replace its values. May be repeated; later files win.",
        rich_help_panel=OUTPUT,
    )
    return [
        ("model", Annotated[str | None, typer.Argument(metavar=optional, help=about, show_default=False)]),
        ("recipe", Annotated[list[Path] | None, files]),
    ]


def _plain(recipe: type[Recipe], name: str, value: Any) -> Any:
    """``["a=1"]`` as ``{"a": 1}`` for mappings; other values unchanged."""
    annotation = _without_none(recipe.model_fields[name].annotation)
    if typing.get_origin(annotation) is not dict:
        return value
    flag = flag_of(name)
    text = typing.get_args(annotation)[1] is str
    pairs = (_pair(flag, _METAVARS[name], item) for item in value)
    return {key: value if text else number(value) for key, value in pairs}


def _pair(flag: str, wanted: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InvalidOption(f"{flag} {text!r}: write {wanted}")
    return key, value
