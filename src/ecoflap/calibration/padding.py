"""Which tokens of a batch are real and which are visual: statistics of inputs must not count padding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

IGNORED = -100  # label of a position that the loss leaves out
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_SAID = ("mm_token_type_ids", "image_embeds_position_mask")  # not 0: a visual token


@dataclass(frozen=True)
class TokenMasks:
    """Real tokens of the text that the encoder (or the only text tower) and the decoder see.

    Each is bool ``[batch, tokens]`` with True = real, or None where every token is real (or there is no such text).
    ``image`` is True where a token of the encoder's text is a visual one, a part of a picture or a film; None where
    none is.
    """

    encoder: torch.Tensor | None
    decoder: torch.Tensor | None
    image: torch.Tensor | None = None


def token_masks(
    batch: Mapping[str, torch.Tensor], is_encoder_decoder: bool, visual: Collection[int] = ()
) -> TokenMasks:
    """Masks of real tokens, from ``attention_mask`` and, for the decoder, ``decoder_attention_mask`` or the labels.

    A decoder that is fed by its shifted labels has a token at each position that predicts a label, so the positions
    with a label other than -100 are the real ones.

    Args:
        visual: ids that stand for visual tokens, see :func:`placeholders`.
    """
    encoder = batch.get("attention_mask")
    decoder = None
    if is_encoder_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != IGNORED
    return TokenMasks(_mask(encoder), _mask(decoder), _visual(batch, visual))


def placeholders(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens in whose place a model puts its visual tokens, by its configuration."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(dict.fromkeys(value for value in found if isinstance(value, int)))


def _visual(batch: Mapping[str, torch.Tensor], visual: Collection[int]) -> torch.Tensor | None:
    """What the processor itself says of the tokens, else where the placeholders are."""
    for name in _SAID:
        said = batch.get(name)
        if isinstance(said, torch.Tensor) and said.ndim == 2:
            mask = said != 0
            return mask if bool(mask.any()) else None
    ids = batch.get("input_ids")
    if not visual or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    mask = torch.isin(ids, torch.tensor(sorted(visual), device=ids.device))
    return mask if bool(mask.any()) else None


def _mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.ndim != 2:
        return None
    real = mask.bool()
    return None if bool(real.all()) else real
