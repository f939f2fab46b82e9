"""Makes the router of a mixture send every token to one expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ABOVE = 1e4  # added to the highest logit; fits into fp16


class TurnedRouter:
    """A router, which is a linear layer with one logit per expert.

    Attributes:
        obeyed: whether each chosen expert received as many tokens as the router.
    """

    def __init__(self, router: nn.Module) -> None:
        self._router = router
        self.obeyed = True
        self._entered: int | None = None
        self._received: int | None = None

    @contextmanager
    def to(self, number: int) -> Iterator[None]:
        """Context in which this expert has the highest logit for each token."""

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
        """Note the number of tokens that the expert receives; only the first call in a context counts."""
        if self._received is None:
            self._received = tokens
