"""Registers the file formats that are recognised by the beginning of a file: a new one is one file and one line here.

Formats of one JSON document are registered in ``PUBLISHED`` in ``formats/``. Imports no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ecoflap.errors import BrokenPlugin
from ecoflap.support.registry import Registry

if TYPE_CHECKING:
    from ecoflap.data.formats.place import Place
    from ecoflap.data.tables import Table


@dataclass(frozen=True)
class Format:
    """A format of data files.

    Attributes:
        suffixes: of its files, in lower case with the dot.
        open: gives the table of a file, or None for a file of another format. Raises CalibrationError for a broken file
            of this format.
    """

    suffixes: tuple[str, ...]
    open: Callable[[Place], Table | None]


def _complaint(made: Any) -> str | None:
    return None if isinstance(made, Format) else "must be an ecoflap.data.registry.Format"


FORMATS: Registry[Format] = Registry(
    "format",
    {"flickr": "ecoflap.data.formats.flickr:FORMAT"},
    group="ecoflap.formats",
    complaint=_complaint,
)


def formats(names: Iterable[str] | None = None) -> Iterator[Format]:
    """The formats ``names``, or all.

    A broken one of another package is left out with a warning, because the user did not request it by name.
    """
    for name in FORMATS if names is None else names:
        try:
            yield FORMATS.get(name)
        except BrokenPlugin as error:
            warnings.warn(str(error), stacklevel=2)


def added_suffixes() -> tuple[str, ...]:
    """File suffixes of formats that other packages add."""
    return tuple(dict.fromkeys(suffix for one in formats(FORMATS.outside()) for suffix in one.suffixes))
