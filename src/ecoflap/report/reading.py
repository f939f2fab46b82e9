"""Reads the files that pages are made from; the fault of a broken one is one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ecoflap.errors import InvalidOption
from ecoflap.support.reading import checked, read_json, read_yaml

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(BaseModel):
    """A JSON object of such a file; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class RecipeFields(Content):
    """The fields of ``recipe.yaml`` that pages and cards use; all others are only shown."""

    model: str | None = None
    importance: str | None = None
    allocation: str | None = None
    criterion: str | None = None
    pattern: str | None = None
    granularity: str | None = None
    rule: str | None = None
    tokens: str | None = None
    objective: str | None = None
    evaluations: list[dict[str, Any]] | None = None
    versions: dict[str, Any] | None = None


M = TypeVar("M", bound=Content)


class GroupSize(Content):
    """Number of samples of a group, and the standard error of its value."""

    n: Count
    stderr: Finite | None = None


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A YAML file of keys and values; None if it does not exist.

    Raises:
        InvalidOption: it is no YAML, no mapping, or one of :class:`RecipeFields` has the wrong type.
    """
    if not path.exists():
        return None
    content = read_yaml(path, "the recipe")
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{path} should map option names to values, but holds {type(content).__name__}")
    checked(content, RecipeFields, str(path))
    return {str(key): value for key, value in content.items()}


def read_model(path: Path, kind: type[M]) -> M | None:
    """A JSON file of format 1 as ``kind``; None if it does not exist.

    Raises:
        InvalidOption: it is no JSON, has another format, or a field is wrong; the message names it.
    """
    if not path.exists():
        return None
    content = read_json(path, "the run's file", finite=False)  # a field that is not finite is reported below
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InvalidOption(f"{path} has format {version!r}; this version of ecoflap reads format {FORMAT}")
    found: M = checked(content, kind, str(path))
    return found
