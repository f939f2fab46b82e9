"""How much the text looks at each visual token: attention weights of a block, seen while it runs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ecoflap.network.drive import Enough

_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax))
_NONE = torch.zeros(0, 0, dtype=torch.bool)
_QUERIES = 64  # rows of a sample's attention map at a time: (heads, 64, tokens) in fp32 exist of it


class TextAttention(TorchFunctionMode):
    """Context that sees the self-attention of a block, and sums what the text's tokens give to every token.

    It reads the arguments of ``scaled_dot_product_attention``, or the result of a softmax over as many keys as there
    are queries (eager attention). Kernels that are neither (flash-attn's own, flex attention) go unseen. Nothing that
    is computed inside changes.

    Args:
        early: the first call with text is seen to its end, to know how many self-attentions a call has; later ones
            end with the last of theirs, by :class:`~ecoflap.network.drive.Enough`.

    Attributes:
        received: for each call of the block, (batch, tokens) fp32: the mean over heads and the text's tokens of the
            weight on each token; of several self-attentions, their sum. None if none was seen in that call.
    """

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.received: list[Tensor | None] = []
        self._text = _NONE
        self._early, self._seen = early, 0  # self-attentions of this call
        self._of_a_call: int | None = None

    def begin(self, text: Tensor | None) -> None:
        """A call of the block begins; ``text``, (batch, tokens) bool, are those whose queries count."""
        if self._early and self._of_a_call is None and self._seen:
            self._of_a_call = self._seen
        self._text, self._seen = _NONE if text is None else text, 0
        self.received.append(None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, self._seen
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see_product(*args, **kwargs)
        elif func in _SOFTMAX:
            self._see_map(result, kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None)
        if before < self._seen == self._of_a_call:  # not at what runs between this call and the next
            raise Enough
        return result

    def _see_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() != 4 or not self._of_these(len(query), query.shape[2], key.shape[2]):
            return
        self._seen += 1
        tokens = query.shape[2]
        factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], tokens)
        for row in range(len(query)):
            keys = key[row].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
            for some in torch.split(self._text[row].nonzero().flatten(), _QUERIES):
                scores = query[row][:, some].float() @ keys.transpose(1, 2) * factor
                if is_causal:
                    ahead = torch.arange(tokens, device=some.device)[None] > some[:, None]
                    scores = scores.masked_fill(ahead, -torch.inf)
                if attn_mask is not None:
                    of_these = attn_mask[row][:, some]
                    if of_these.dtype == torch.bool:
                        scores = scores.masked_fill(~of_these, -torch.inf)
                    else:
                        scores = scores + of_these
                self._add(row, scores.softmax(dim=-1).nan_to_num().sum(1).mean(0))  # a query that sees no key: NaN

    def _see_map(self, weights: Tensor, dim: int | None) -> None:
        if weights.dim() != 4 or dim not in (-1, 3) or not self._of_these(len(weights), *weights.shape[2:]):
            return
        self._seen += 1
        for row in range(len(weights)):
            self._add(row, weights[row][:, self._text[row]].float().nan_to_num().sum(1).mean(0))

    def _of_these(self, batch: int, queries: int, keys: int) -> bool:
        return bool(self.received) and (batch, queries) == self._text.shape and keys == queries

    def _add(self, row: int, weights: Tensor) -> None:
        seen = self.received[-1]
        if seen is None:
            seen = self.received[-1] = torch.zeros(self._text.shape, device=weights.device)
        seen[row] += weights / max(1, int(self._text[row].sum()))
