"""Reads the files that pages are made of, and says in one line what is wrong with one that is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ecoflap.errors import InvalidOption

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Content(BaseModel):
    """A JSON object of such a file; fields that are not known are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


M = TypeVar("M", bound=Content)


def read_text(path: Path) -> str | None:
    """The file as text; None where it does not exist.

    Raises:
        InvalidOption: it is there but cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{path} cannot be read: {error}") from error


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A YAML file of keys and values; None where it does not exist.

    Raises:
        InvalidOption: it is no YAML, or no mapping.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidOption(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{path} should map option names to values, but holds {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_model(path: Path, kind: type[M]) -> M | None:
    """A JSON file of format 1 as ``kind``; None where it does not exist.

    Raises:
        InvalidOption: it is no JSON, of another format, or a field is not what it should be; the message names it.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidOption(f"{path} is not valid JSON: {error}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InvalidOption(f"{path} has format {version!r}; this version of ecoflap reads format {FORMAT}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidOption(f"{path}: {where}: {first['msg']}") from error
