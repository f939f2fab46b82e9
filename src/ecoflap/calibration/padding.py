"""Which tokens of a batch are real: statistics of a layer's inputs must not count padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

IGNORED = -100  # label of a position that the loss leaves out


@dataclass(frozen=True)
class TokenMasks:
    """Real tokens of the text that the encoder (or the only text tower) and the decoder see.

    Each is bool ``[batch, tokens]`` with True = real, or None where every token is real (or there is no such text).
    """

    encoder: torch.Tensor | None
    decoder: torch.Tensor | None


def token_masks(batch: Mapping[str, torch.Tensor], is_encoder_decoder: bool) -> TokenMasks:
    """Masks of real tokens, from ``attention_mask`` and, for the decoder, ``decoder_attention_mask`` or the labels.

    A decoder that is fed by its shifted labels has a token at each position that predicts a label, so the positions
    with a label other than -100 are the real ones.
    """
    encoder = batch.get("attention_mask")
    decoder = None
    if is_encoder_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != IGNORED
    return TokenMasks(_mask(encoder), _mask(decoder))


def _mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.ndim != 2:
        return None
    real = mask.bool()
    return None if bool(real.all()) else real
