"""Reads the files that pages are made from; says in one line what is wrong with a broken one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ecoflap.errors import InvalidOption
from ecoflap.support.reading import read_json, read_yaml

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(BaseModel):
    """A JSON object of such a file; fields that are not known are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


M = TypeVar("M", bound=Content)


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A YAML file of keys and values; None where it does not exist.

    Raises:
        InvalidOption: it is no YAML, or no mapping.
    """
    if not path.exists():
        return None
    content = read_yaml(path, "the recipe")
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{path} should map option names to values, but holds {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_model(path: Path, kind: type[M]) -> M | None:
    """A JSON file of format 1 as ``kind``; None where it does not exist.

    Raises:
        InvalidOption: it is no JSON, of another format, or a field is not what it should be; the message names it.
    """
    if not path.exists():
        return None
    content = read_json(path, "the run's file", finite=False)  # the field that is not finite is named below
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InvalidOption(f"{path} has format {version!r}; this version of ecoflap reads format {FORMAT}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidOption(f"{path}: {where}: {first['msg']}") from error
