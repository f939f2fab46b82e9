"""Forward-mode derivatives (dual tensors) in a network: who carries one, and attention that passes them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def with_tangent(tensor: Tensor, tangent: Tensor) -> Tensor:
    """A view of ``tensor`` that carries ``tangent`` (same shape and dtype) until the ``dual_level`` around it ends."""
    dual: Tensor = forward_ad.make_dual(tensor, tangent)  # type: ignore[no-untyped-call]
    return dual


def tangent_of(tensor: Tensor) -> Tensor | None:
    """The forward-mode derivative that a tensor carries, in its shape; None where it carries none."""
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def has_tangent(value: Any) -> bool:
    """Whether this is a tensor that carries a forward-mode derivative."""
    return isinstance(value, Tensor) and tangent_of(value) is not None


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """torch's scaled dot-product attention is computed by elementary operators inside: fused kernels have no forward
    mode. The matrix of attention weights exists in memory meanwhile.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield
