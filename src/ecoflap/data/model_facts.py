"""Reads facts for batches and losses from the config and the forward's signature; makes masks of real tokens."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ecoflap.model.modality import is_encoder_decoder as is_encoder_decoder
from ecoflap.model.modality import text_config as text_config
from ecoflap.model.offload import home_of

Batch = dict[str, torch.Tensor]
DEFAULT_LENGTH = 2048  # of text windows, if the model supports it; the length in papers with LLaMA


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def is_dual_tower(model: nn.Module) -> bool:
    """CLIP-like: image and text towers side by side, and a contrastive loss on request."""
    return "return_loss" in parameters_of(model)


def needs_image(model: nn.Module) -> bool:
    """Whether ``forward`` cannot run without ``pixel_values`` (BLIP-2; LLaVA also takes only text)."""
    parameter = parameters_of(model).get("pixel_values")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def takes_images(model: nn.Module) -> bool:
    """Whether ``forward`` has an argument for images."""
    return any(name.startswith("pixel_values") for name in parameters_of(model))


def can_take(model: nn.Module, argument: str) -> bool:
    """Whether ``forward`` has ``argument``, by name or as one of a generating model's pass-through arguments."""
    parameters = parameters_of(model)
    if argument in parameters:
        return True
    generates = getattr(model, "can_generate", None)
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return passes_on and callable(generates) and bool(generates())


def max_length(model: nn.Module) -> int | None:
    """Longest text in tokens that the model has positions for; None if it is not limited."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(config, name, None)
        # T5 has n_positions from its training, but relative positions without a limit
        if isinstance(value, int) and value > 0 and not getattr(config, "relative_attention_num_buckets", None):
            return value
    return None


def image_token_id(model: nn.Module, processor: Any) -> int | None:
    """Id of the placeholder token at image positions in the text; None if the model has none."""
    config = getattr(model, "config", None)
    for holder, name in ((config, "image_token_id"), (config, "image_token_index"), (processor, "image_token_id")):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return None


@overload
def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]: ...
@overload
def to_device(batch: Any, model: nn.Module) -> Any: ...
def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch on the model's device, floating tensors (``pixel_values``) in the model's dtype; no copy if it fits.

    A mapping becomes a dictionary; in any other batch (a tuple, for a loss that takes it) the tensors are moved.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return dict(batch) if isinstance(batch, Mapping) else batch
    dtype = getattr(model, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else first.dtype
    device = home_of(model)

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    if not isinstance(batch, Mapping):
        return pytree.tree_map(move, batch)
    return {name: move(value) for name, value in batch.items()}


def batch_size_of(batch: Any) -> int:
    """Number of samples in a batch: rows of the labels, else the text, else the images.

    If the batch is no mapping: rows of its first tensor.
    """
    if not isinstance(batch, Mapping):
        leaves = pytree.tree_leaves(batch)
        return next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)
    for name in ("labels", "input_ids", "pixel_values"):
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[0])
    return next((int(v.shape[0]) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 0)


IGNORED = -100  # label of positions that the loss ignores
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_SAID = ("mm_token_type_ids", "image_embeds_position_mask")  # not 0: a visual token


@dataclass(frozen=True)
class TokenMasks:
    """Masks of real tokens of the encoder's (or the only) text and of the decoder's text.

    Each is bool ``[batch, tokens]`` with True = real, or None if every token is real (or there is no such text).
    ``image`` is True for visual tokens (of images or videos) in the encoder's text; None if there are none.
    """

    encoder: torch.Tensor | None
    decoder: torch.Tensor | None
    image: torch.Tensor | None = None


def token_masks(batch: Any, is_encoder_decoder: bool, visual: Collection[int] = ()) -> TokenMasks:
    """Masks of real tokens, from ``attention_mask`` and, for the decoder, ``decoder_attention_mask`` or the labels.

    A decoder whose inputs are its shifted labels has a real token at each position with a label other than -100.

    Args:
        visual: ids of placeholders for visual tokens, see :func:`placeholders`.
    """
    if not isinstance(batch, Mapping):  # for the user's own loss: padding is unknown
        return TokenMasks(None, None)
    encoder = batch.get("attention_mask")
    decoder = None
    if is_encoder_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != IGNORED
    return TokenMasks(_mask(encoder), _mask(decoder), _visual(batch, visual))


def placeholders(model: nn.Module) -> tuple[int, ...]:
    """Ids of the placeholder tokens that a model replaces by visual tokens, from its configuration."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(dict.fromkeys(value for value in found if isinstance(value, int)))


def _visual(batch: Mapping[str, torch.Tensor], visual: Collection[int]) -> torch.Tensor | None:
    """The mask of visual tokens by the processor's token types, or else by the placeholders."""
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
