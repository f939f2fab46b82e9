"""Chooses which tokens of a tower with text and images enter the statistics, and with what weight.

Some choices rank visual tokens by the attention that text tokens give them, recorded while the block runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.data.model_facts import TokenMasks, placeholders, token_masks
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.model.block_runner import BlockCall, Enough, TowerDriver
from ecoflap.model.parts import Block
from ecoflap.model.trace import tensors_in
from ecoflap.statistics.choice import TokenChoice
from ecoflap.support.workers import ALONE, Workers

_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax))
_NONE = torch.zeros(0, 0, dtype=torch.bool)
_QUERIES = 64  # rows of an attention map at a time, for memory: (heads, 64, tokens) in fp32


class TextAttention(TorchFunctionMode):
    """Context that records a block's self-attention, and averages the attention of text tokens to every token.

    It reads the arguments of ``scaled_dot_product_attention``, or the result of a softmax with as many keys as queries
    (eager attention). Other kernels (flash-attn's own, flex attention) are not recorded. The computation itself is
    unchanged.

    Args:
        early: the first call with text runs to its end, to count its self-attentions; later calls end after the last
            one, by :class:`~ecoflap.model.block_runner.Enough`.

    Attributes:
        received: for each call of the block, (batch, tokens) fp32: the attention weight of each token, averaged over
            heads and text tokens and summed over self-attentions. None if no self-attention was recorded.
    """

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.received: list[Tensor | None] = []
        self._text = _NONE
        self._early, self._seen = early, 0  # number of self-attentions in this call
        self._of_a_call: int | None = None

    def begin(self, text: Tensor | None) -> None:
        """Begin a call of the block; ``text`` (batch, tokens) bool marks the tokens whose queries count."""
        if self._early and self._of_a_call is None and self._seen:
            self._of_a_call = self._seen
        self._text, self._seen = _NONE if text is None else text, 0
        self.received.append(None)

    def end(self) -> None:
        """Stop recording."""
        self._text = _NONE

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, self._seen
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see_product(*args, **kwargs)
        elif func in _SOFTMAX:
            self._see_map(result, kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None)
        if before < self._seen == self._of_a_call:  # right after the call's last self-attention
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


Chooser = Callable[[int, BlockCall], Tensor | None]


def check_choice(choice: TokenChoice, model: nn.Module, batches: Sequence[Any], statistics: str) -> None:
    """Checks before pruning that a choice of tokens can change anything.

    Args:
        statistics: what the criterion asks for: "none", "norm" or "gram".

    Raises:
        InvalidOption: the criterion reads no input statistics.
        CalibrationError: no batch has visual tokens among those of the text.
    """
    if choice.name == "all" or not choice.required:
        return
    if statistics == "none":
        raise InvalidOption(f"tokens '{choice.name}' changes nothing: the criterion reads no statistics of inputs")
    if not sees_visual_tokens(model, batches):
        raise CalibrationError(
            f"tokens '{choice.name}': no language tower of {type(model).__name__} sees visual tokens in the "
            "calibration data: leave the option out"
        )


def sees_visual_tokens(model: nn.Module, batches: Sequence[Any]) -> bool:
    """Whether some batch has visual tokens among those of the text."""
    known = placeholders(model)
    return any(token_masks(batch, False, known).image is not None for batch in batches)


def chooser(
    choice: TokenChoice,
    model: nn.Module,
    driver: TowerDriver,
    index: int,
    block: Block,
    masks: Mapping[int, TokenMasks],
    sequence: str | None,
    workers: Workers = ALONE,
) -> Chooser | None:
    """The function that gives the token mask of a call of the block, by the call's number; None if all tokens count.

    The mask is bool; for "weighted" and "balanced" it holds the fp32 weights of the squared inputs.

    The driver holds the block's inputs. "atv" runs the block once more on all of them, "text+attended" up to its
    attention.

    Args:
        masks: of this worker's batches; the number of visual tokens that count depends on the batches of all workers.

    Raises:
        InvalidOption: "text+attended", if the block's attention can't be recorded.
    """
    if not any_to_choose(choice, masks, sequence, workers):
        return None
    drifts = _token_drift(model, driver, index, block) if choice.name == "atv" else []
    attended = _attended(driver, index, block, masks) if choice.name == "text+attended" else {}
    return choosing(choice, masks, block, drifts, attended, workers)


def any_to_choose(choice: TokenChoice, masks: Mapping[int, TokenMasks], sequence: str | None, workers: Workers) -> bool:
    """Whether the choice leaves out tokens and a block sees text and images in a batch of some worker."""
    shared = sequence == "encoder" and any(mask.image is not None for mask in masks.values())
    return choice.name != "all" and any(workers.gather(shared))


def choosing(
    choice: TokenChoice,
    masks: Mapping[int, TokenMasks],
    block: Block,
    drifts: Sequence[tuple[int, Tensor]],
    attended: Mapping[int, Tensor],
    workers: Workers,
) -> Chooser:
    """As :func:`chooser`, from values that were measured already.

    Args:
        drifts: for "atv": the batch number and :func:`turned` (batch, tokens) of each call.
        attended: for "text+attended": the attention to each token (batch, tokens), by the number of each call with an
            image.
    """
    reach = choice.used
    if choice.name == "atv":
        seen = [drift[_visual(masks[batch], drift, block)].cpu() for batch, drift in drifts]
        if everywhere := [one for of_worker in workers.gather(seen) for one in of_worker]:
            reach = min(1.0, reach * float(torch.cat(everywhere).mean()))

    def choose(number: int, call: BlockCall) -> Tensor | None:
        mask = masks[call.batch]
        if mask.image is None:
            return None
        x = tensors_in((call.args, call.kwargs))[0]
        visual, text = split_tokens(mask, x, block)
        if choice.name == "text":
            return text
        if choice.name == "weighted":
            return text.float() + reach * visual.float()
        if choice.name == "balanced":
            return text.float() + balance(text, visual, reach)[:, None] * visual.float()
        if choice.name == "atv":
            wanted = [round(reach * count) for count in text.sum(1).tolist()]
            return text | largest(drifts[number][1], visual, wanted)
        wanted = [round(reach * count) for count in visual.sum(1).tolist()]
        scores = attended[number] if attended else torch.linalg.vector_norm(x.float(), dim=-1)
        return text | largest(scores, visual, wanted)

    return choose


def balance(text: Tensor, visual: Tensor, factor: float) -> Tensor:
    """(batch,) the weight of a visual token of each sample: min(1, factor · text tokens / visual tokens).

    It is 1 if a sample has no text or no visual token.

    Args:
        text, visual: (batch, tokens) bool.
    """
    texts, pictures = text.sum(1).float(), visual.sum(1).clamp(min=1).float()
    return torch.where(texts > 0, factor * texts / pictures, 1.0).clamp(max=1.0)


def largest(scores: Tensor, among: Tensor, counts: Sequence[int]) -> Tensor:
    """True for the ``counts[row]`` largest scores of each row (for all, if there are fewer).

    Args:
        scores: (batch, tokens).
        among: (batch, tokens) bool: the tokens that may be taken.
    """
    found = torch.zeros_like(among)
    for row, count in enumerate(counts):
        allowed = scores[row].masked_fill(~among[row], -torch.inf)
        found[row, allowed.topk(min(count, int(among[row].sum()))).indices] = True
    return found


def _visual(mask: TokenMasks, x: Tensor, block: Block) -> Tensor:
    """(batch, tokens) bool: the visual tokens of ``x`` (batch, tokens, ...)."""
    if mask.image is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if x.shape[:2] != mask.image.shape:
        raise CalibrationError(
            f"{block.name} sees {tuple(x.shape[:2])} tokens, but the text has {tuple(mask.image.shape)}, so it is "
            "unknown which are visual: leave out --tokens"
        )
    return mask.image.to(x.device)


def split_tokens(mask: TokenMasks, x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(batch, tokens) bool for ``x``: the visual tokens, and the text tokens without padding."""
    visual = _visual(mask, x, block)
    return visual, ~visual if mask.encoder is None else mask.encoder.to(x.device) & ~visual


def _attended(driver: TowerDriver, index: int, block: Block, masks: Mapping[int, TokenMasks]) -> dict[int, Tensor]:
    """The attention of the text to each token (batch, tokens), by the number of each call with an image."""
    pictures: list[bool] = []

    def before(call: BlockCall) -> None:
        mask = masks[call.batch]
        pictures.append(mask.image is not None)
        x = tensors_in((call.args, call.kwargs))[0]
        attention.begin(split_tokens(mask, x, block)[1] if pictures[-1] else None)

    attention = TextAttention(early=True)
    with attention:
        driver.observe(index, before)
    return received_by(attention, pictures, block)


def received_by(attention: TextAttention, pictures: Sequence[bool], block: Block) -> dict[int, Tensor]:
    """The recorded attention (batch, tokens), by the number of each call with an image.

    Raises:
        InvalidOption: the attention of such a call was not recorded.
    """
    if any(picture and seen is None for picture, seen in zip(pictures, attention.received, strict=True)):
        raise InvalidOption(
            f"tokens 'text+attended' can't record the attention of {block.name}: take text+top, or load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    return {number: seen for number, seen in enumerate(attention.received) if seen is not None}


def turned(x: Tensor, output: Any) -> Tensor:
    """(batch, tokens) 1 − cos(input, output) of each token of a block."""
    return 1 - F.cosine_similarity(x.float(), tensors_in(output)[0].float(), dim=-1)


def _token_drift(model: nn.Module, driver: TowerDriver, index: int, block: Block) -> list[tuple[int, Tensor]]:
    """The batch number and :func:`turned` of each call of the block."""
    entered: list[tuple[int, Tensor]] = []
    found: list[tuple[int, Tensor]] = []

    def before(call: BlockCall) -> None:
        entered.append((call.batch, tensors_in((call.args, call.kwargs))[0]))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        batch, x = entered.pop()
        found.append((batch, turned(x, output)))

    handle = model.get_submodule(block.name).register_forward_hook(after)
    try:
        driver.observe(index, before)
    finally:
        handle.remove()
    return found
