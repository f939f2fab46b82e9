"""Inputs for a model of any family at pico size: text, and pictures where the model takes them in a known form."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

COUNT, TEXT = 2, 10  # samples of a batch, and their tokens of text
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id", "img_context_token_id")
_GRID = (1, 4, 4)  # time, height and width in patches


def text(seed: int = 0) -> dict[str, Tensor]:
    """A batch of random words, without padding: of that the tests of the matrix tell."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (COUNT, TEXT), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def special(kind: str, seed: int = 0) -> dict[str, Tensor] | None:
    """A batch for a type that takes what no other does."""
    if kind == "diffusion_gemma":  # which draws the tokens that it begins with, where none are given
        return {**text(seed), "decoder_input_ids": text(seed + 100)["input_ids"][:, :4]}
    if kind == "udop":  # words with their places on a page
        words = text(seed)
        places = torch.rand(COUNT, TEXT, 4, generator=torch.Generator().manual_seed(seed))
        return {**words, "bbox": places.sort(dim=-1).values}
    if kind == "pp_formulanet":
        words = text(seed)
        pictures = torch.randn(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": pictures, "decoder_input_ids": words["input_ids"], "labels": words["labels"]}
    return None


def with_pictures(model: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """A batch whose samples have a picture; None if the model takes none in a form that is known here."""
    return _among_text(model, seed) or _beside_text(model, seed)


def _beside_text(model: nn.Module, seed: int) -> dict[str, Tensor] | None:
    """Pictures that need no place among the words."""
    takes, words = inspect.signature(model.forward).parameters, text(seed)
    random = torch.Generator().manual_seed(seed)
    vision = _vision(model.config)
    side = getattr(vision, "image_size", None)
    side = side if isinstance(side, int) else 56
    if "flattened_patches" in takes:
        return {"flattened_patches": torch.rand(COUNT, 6, 770, generator=random), "labels": words["labels"]}
    if "pixel_values" not in takes:
        return None
    ids = {"qformer_input_ids": words["input_ids"]} if "qformer_input_ids" in takes else {}
    for count in ((), (1,), (4,)):
        pictures = {"pixel_values": torch.randn(COUNT, *count, 3, side, side, generator=random)}
        if "image_attention_mask" in takes and count:
            pictures["image_attention_mask"] = torch.ones(COUNT, TEXT, *count, dtype=torch.long)
        for batch in ({**words, **ids, **pictures}, {"labels": words["labels"], **pictures}):
            try:
                with torch.no_grad():
                    output: Any = model(**batch)
            except Exception:
                continue
            if getattr(output, "loss", None) is not None:
                return batch
    return None


def _among_text(model: nn.Module, seed: int) -> dict[str, Tensor] | None:
    config: Any = model.config
    token = next((getattr(config, name, None) for name in _IMAGE_TOKENS if getattr(config, name, None)), None)
    owner = next((one for one in (model, getattr(model, "model", None)) if hasattr(one, "get_image_features")), None)
    if token is None or owner is None:
        return None
    features: Any = owner.get_image_features
    for pictures in _candidates(_vision(config), inspect.signature(features).parameters, seed):
        try:
            with torch.no_grad():
                found = features(**pictures)
        except Exception:
            continue  # in another form
        rows = sum(one[..., 0].numel() for one in _tensors(getattr(found, "pooler_output", found)))
        if rows == 0 or rows % COUNT:
            continue
        for batch in _batches(int(token), rows // COUNT, pictures, seed):
            if getattr(config, "is_encoder_decoder", False) or getattr(text_of(config), "is_encoder_decoder", False):
                batch["labels"] = text(seed)["labels"]
            try:
                with torch.no_grad():
                    model(**batch)
            except Exception:
                continue
            return batch
    return None


def _batches(token: int, count: int, pictures: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    words = text(seed)
    marks = torch.full((COUNT, count), token)
    batch = {
        "input_ids": torch.cat([marks, words["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(marks), words["attention_mask"]], dim=1),
        "labels": torch.cat([marks.fill_(-100).clone(), words["labels"]], dim=1),
    }
    batch["input_ids"][:, :count] = token
    yield {**batch, **pictures}
    kinds = (batch["input_ids"] == token).long()
    for name in ("mm_token_type_ids", "token_type_ids"):
        yield {**batch, **pictures, name: kinds}


def text_of(config: Any) -> Any:
    """The configuration of the text part."""
    return getattr(config, "text_config", config)


def _vision(config: Any) -> Any:
    for name in ("vision_config", "vision", "image_config", "visual_config", "encoder"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _candidates(vision: Any, takes: Mapping[str, Any], seed: int) -> Iterator[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    patch, channels = getattr(vision, "patch_size", 14), getattr(vision, "num_channels", None) or 3
    patch = patch if isinstance(patch, int) else patch[0]
    size = getattr(vision, "image_size", None)
    for side in dict.fromkeys(one for one in (size, 4 * patch) if isinstance(one, int)):
        sizes = {"image_sizes": torch.full((COUNT, 2), side)} if "image_sizes" in takes else {}
        for shape in (
            (COUNT, channels, side, side),
            (COUNT, 1, channels, side, side),
            (COUNT, 2, channels, side, side),
        ):
            yield {"pixel_values": torch.randn(shape, generator=random), **sizes}
    grid = torch.tensor([_GRID] * COUNT)
    patches = int(grid.prod(dim=1).sum())
    for name in ("image_grid_thw", "grid_thws", "grid_thw"):
        if name in takes:
            for times in (getattr(vision, "temporal_patch_size", 1), 1):
                flat = torch.randn(patches, channels * times * patch * patch, generator=random)
                yield {"pixel_values": flat, name: grid}
                yield {"pixel_values": flat.view(patches, channels * times, patch, patch), name: grid}


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [one for part in found for one in _tensors(part)] if isinstance(found, list | tuple) else []
