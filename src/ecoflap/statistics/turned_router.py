"""Turns the router of a mixture to one expert, so that this one receives every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ABOVE = 1e4  # by which one logit is made the highest: fp16 has room for it


class TurnedRouter:
    """A linear layer that gives one logit to each expert, and what came of changing these.

    Attributes:
        obeyed: whether the experts to which it was turned received as many tokens as it did, each time.
    """

    def __init__(self, router: nn.Module) -> None:
        self._router = router
        self.obeyed = True
        self._entered: int | None = None
        self._received: int | None = None

    @contextmanager
    def to(self, number: int) -> Iterator[None]:
        """Inside, this expert's logit is the highest of each token."""

        def turn(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
            self._entered = logits.shape[:-1].numel()
            turned = logits.clone()
            turned[..., number] = logits.amax(dim=-1) + _ABOVE
            return turned

        self._entered = self._received = None
        handle = self._router.register_forward_hook(turn)
        try:
            yield
        finally:
            handle.remove()
        self.obeyed &= self._entered is not None and self._received == self._entered

    def note(self, tokens: int) -> None:
        """The expert receives so many; what it receives first counts."""
        if self._received is None:
            self._received = tokens
