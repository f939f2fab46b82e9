"""Replaces a module's forward for the time of a context, on the instance alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def forward_replaced(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """``module.forward`` is ``wrap(old forward)`` inside; hooks still fire, and the old state returns at exit."""
    own = module.__dict__.get("forward")  # an instance attribute if some other tool has wrapped it already
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own
