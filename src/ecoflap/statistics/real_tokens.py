"""Finds the real tokens of a call from the attention masks that the block receives, also after a router."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCKED = -1e4  # an additive mask has 0 and values below this (fp16's range ends soon after)
# A block with separate layers for queries and text (Q-Former) names the queries' layers so.
QUERY_WORDS = ("query", "cross")


@dataclass(frozen=True)
class OwnMasks:
    """Real tokens by the masks of one call of a block.

    Attributes:
        tokens: bool ``[batch, tokens]`` of the block's own sequence; None if its mask does not show it (there is none,
            or it is causal, which mixes order with padding).
        others: the same for the encoder's sequence that the block attends to.
        attends: the block has an argument for the mask of ``others``; without a mask all of these are real.
        queries: number of query tokens before the text, 0 for blocks without them.
    """

    tokens: Tensor | None
    others: Tensor | None
    attends: bool
    queries: int

    def of(self, x: Tensor, module: str) -> Tensor | None:
        """Real tokens of a layer's input, which is the block's whole sequence, or only its queries or its text.

        Args:
            x: ``[batch, tokens, features]``, or ``[batch · tokens, features]``.
            module: path of the layer; it distinguishes queries from text if both have the same length.
        """
        mask = self.tokens
        if mask is None:
            return None
        if x.shape[:-1] in (mask.shape, (mask.numel(),)):
            return mask.reshape(x.shape[:-1])
        if x.dim() != 3 or len(x) != len(mask) or not self.queries:
            return None
        text = mask.shape[1] - self.queries
        if x.shape[1] == self.queries and (text != self.queries or _names_queries(module)):
            return mask[:, : self.queries]
        return mask[:, self.queries :] if x.shape[1] == text else None


def _names_queries(module: str) -> bool:
    return any(word in module for word in QUERY_WORDS)


def own_masks(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OwnMasks:
    """The masks among the arguments of a call, found by the names of the block's parameters."""
    try:
        named = inspect.signature(type(block).forward).bind_partial(block, *args, **kwargs).arguments
    except (TypeError, ValueError):
        return OwnMasks(None, None, False, 0)
    named = {**named, **named.get("kwargs", {})}
    queries = named.get("query_length")
    return OwnMasks(
        tokens=_real(named.get("attention_mask")),
        others=_real(named.get("encoder_attention_mask")),
        attends="encoder_attention_mask" in inspect.signature(type(block).forward).parameters,
        queries=queries if isinstance(queries, int) else 0,
    )


def _real(mask: Any) -> Tensor | None:
    """``[batch, keys]``, True for keys that may be attended to, if these are the same for every query and head."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:  # a mask of integers marks real tokens; others may be masks of queries and keys
        return None if mask.is_floating_point() or mask.dtype == torch.bool else mask != 0
    if mask.is_floating_point():
        allowed = mask == 0
        if not (allowed | (mask <= BLOCKED)).all():
            return None  # it contains a position bias, too
    else:
        allowed = mask != 0
    first, last = allowed[:, :1, :1], allowed[:, :1, -1:]
    if not (torch.equal(first, last) and (allowed == first).all()):
        return None
    return first[:, 0, 0]


_CHUNK = 1 << 22  # numbers hashed at a time


def row_hashes(x: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row of ``x`` (tokens, features): (tokens,) int64.

    Sums of products with fixed odd numbers modulo 2⁶⁴: without rounding, so a copied row has the same hash. Two
    different rows have the same hash with a probability of about 2⁻⁶³.
    """
    x = x.detach().contiguous()
    words = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (words.shape[1],), generator=generator) * 2 + 1
    factors = factors.to(x.device)
    rows = max(1, _CHUNK // max(1, words.shape[1]))
    return torch.cat([(part.to(torch.int64) * factors).sum(1) for part in torch.split(words, rows)])


class RoutedTokens:
    """The input tokens of a mixture in one call, real and padded.

    Args:
        x: (..., features), the mixture's input.
        real: bool, the leading dimensions of ``x``, True = real.
    """

    def __init__(self, x: Tensor, real: Tensor) -> None:
        hashes = row_hashes(x.reshape(-1, x.shape[-1]))
        self._kind = x.shape[-1], x.dtype
        self._all, self._real = hashes, hashes[real.reshape(-1)]

    def __len__(self) -> int:
        return len(self._all)

    def real_among(self, x: Tensor) -> Tensor | None:
        """(tokens,) bool: which rows of ``x`` (tokens, features) are copies of real tokens.

        None if a row is no copy of any token, because the mixture scales its tokens.
        """
        if (x.shape[-1], x.dtype) != self._kind:
            return None
        hashes = row_hashes(x.reshape(-1, x.shape[-1]))
        if not torch.isin(hashes, self._all).all():
            return None
        return torch.isin(hashes, self._real)
