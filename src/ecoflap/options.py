"""Command-line options made from the recipe's own fields: one home for names, types, defaults and help."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ecoflap.errors import InvalidOption
from ecoflap.recipe import Recipe


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _option(name: str) -> inspect.Parameter:
    field = Recipe.model_fields[name]
    annotation = _without_none(field.annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    flag = "--" + name.replace("_", "-")
    help_text, metavar = field.description or "", None
    default = field.get_default(call_default_factory=True)
    kind: Any = annotation | None
    if annotation is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif origin is typing.Literal:
        kind, metavar = str | None, "|".join(arguments)
    elif origin is dict:
        kind, metavar, help_text = list[str] | None, "KEY=VALUE", f"{help_text} May be repeated."
    elif origin is tuple:
        kind, metavar, help_text = list[str] | None, "TEXT", f"{help_text} May be repeated."
    if isinstance(default, int | float | str) and not isinstance(default, bool):
        help_text = f"{help_text} Default: {default}."
    # None means "not given", so that a recipe file's value stands; the default is therefore said in the help.
    return _parameter(name, Annotated[kind, typer.Option(flag, help=help_text, metavar=metavar, show_default=False)])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_recipe_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options ``names`` (fields of the recipe; all but ``model`` if none is named) and ``--recipe``.

    The command takes a :class:`Recipe` as its first argument, built from the recipe file and the options given.
    """
    chosen = names or tuple(name for name in Recipe.model_fields if name != "model")

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [_option(name) for name in chosen if name != "model"]
        file = Annotated[Path | None, typer.Option("--recipe", help="YAML with any of these options; options win.")]
        model = Annotated[
            str | None,
            typer.Argument(metavar="[MODEL]", help=Recipe.model_fields["model"].description, show_default=False),
        ]

        def wrapper(**values: Any) -> None:
            recipe_file = values.pop("recipe")
            given = {name: values.pop(name) for name in ("model", *chosen) if name in values}
            changes = {name: _plain(name, value) for name, value in given.items() if value is not None and value != []}
            recipe = Recipe.load(recipe_file, changes) if recipe_file else Recipe.parse(changes, "options")
            command(recipe, **values)

        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            _parameter("model", model),
            *added,
            _parameter("recipe", file),
            *(parameter.replace(kind=keyword) for parameter in own),
        ]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _plain(name: str, value: Any) -> Any:
    """``["a=1"]`` as ``{"a": 1}`` for mappings; anything else as it is."""
    if typing.get_origin(_without_none(Recipe.model_fields[name].annotation)) is not dict:
        return value
    flag = "--" + name.replace("_", "-")
    return dict(_pair(flag, item) for item in value)


def _pair(flag: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise InvalidOption(f"{flag} {text!r}: write key=value")
    return key, _number(value)


def _number(text: str) -> Any:
    """A number or truth value where the text is one."""
    named: Mapping[str, bool] = {"true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
