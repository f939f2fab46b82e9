"""Inputs for a model of any family at pico size: text, and pictures where the model takes them in a known form."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from family_sweep.own_pictures import own_pictures
from family_sweep.pictures import COUNT, candidates, vision_of

VIDEO = 198  # the mark of a video's tokens, where it is set by hand
TEXT = 10  # tokens of text of a sample
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id", "img_context_token_id")


def text(seed: int = 0) -> dict[str, Tensor]:
    """A batch of random words, without padding: of that the tests of the matrix tell."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (COUNT, TEXT), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def special(kind: str, config: Any, seed: int = 0) -> dict[str, Tensor] | None:
    """A batch for a type that takes what no other does."""
    if (own := own_pictures(kind, config, text(seed), seed)) is not None:
        if kind == "diffusion_gemma":  # which draws the tokens that it begins with, where none are given
            own["decoder_input_ids"] = text(seed + 100)["input_ids"][:, :4]
        return own
    if kind == "evolla":  # a protein for each text
        proteins = torch.randint(4, 20, (COUNT, 9), generator=torch.Generator().manual_seed(seed))
        return {**text(seed), "protein_input_ids": proteins, "protein_attention_mask": torch.ones_like(proteins)}
    if kind == "udop":  # words with their places on a page, and the page
        random, words = torch.Generator().manual_seed(seed), text(seed)
        places = torch.rand(COUNT, TEXT, 4, generator=random).sort(dim=-1).values
        page = torch.randn(COUNT, 3, config.image_size, config.image_size, generator=random)
        return {**words, "bbox": places, "pixel_values": page}
    if kind == "kosmos-2.5":  # the places of four tokens are the picture's
        random, words = torch.Generator().manual_seed(seed), text(seed)
        places = torch.tensor([[1] * 4 + [0] * (TEXT - 4)] * COUNT)
        patches = torch.rand(COUNT, 6, 770, generator=random)
        return {**words, "flattened_patches": patches, "image_embeds_position_mask": places}
    if kind == "mllama":  # one picture of one tile
        random = torch.Generator().manual_seed(seed)
        return {
            **text(seed), "pixel_values": torch.randn(COUNT, 1, 4, 3, 56, 56, generator=random),
            "aspect_ratio_ids": torch.ones(COUNT, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * COUNT),
            "cross_attention_mask": torch.tensor([[[[1, 0, 0, 0]]] * TEXT] * COUNT),
        }  # fmt: skip
    if kind == "instructblipvideo":  # four frames, for each of which the bridge gives 4 tokens
        random, words = torch.Generator().manual_seed(seed), text(seed)
        marks = torch.full((COUNT, 4 * 4), VIDEO)
        return {
            "pixel_values": torch.randn(COUNT, 4, 3, 56, 56, generator=random),
            "qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"],
            "input_ids": torch.cat([marks, words["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(marks), words["attention_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(marks, -100), words["labels"]], dim=1),
        }  # fmt: skip
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
    vision = vision_of(model.config)
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
    takes = inspect.signature(model.forward).parameters
    token = next((getattr(config, name, None) for name in _IMAGE_TOKENS if getattr(config, name, None)), None)
    owner = next((one for one in (model, getattr(model, "model", None)) if hasattr(one, "get_image_features")), None)
    if token is None or owner is None:
        return None
    features: Any = owner.get_image_features
    for pictures in candidates(config, {**inspect.signature(features).parameters, **takes}, seed):
        found = _features(features, pictures)
        if found is None:
            continue  # in another form
        rows = sum(one[..., 0].numel() for one in _tensors(_of_words(found)))
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


def _features(features: Any, pictures: Mapping[str, Tensor]) -> Any:
    """What a model makes of pictures; None if it does not take them so."""
    named = inspect.signature(features).parameters
    for given in ({name: value for name, value in pictures.items() if name in named}, pictures):
        try:
            with torch.no_grad():
                return features(**given)
        except Exception:
            continue
    return None


def _batches(token: int, count: int, pictures: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    words = text(seed)
    words["input_ids"] = words["input_ids"].where(words["input_ids"] != token, token + 1)
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


def _of_words(found: Any) -> Any:
    """What takes the places of words."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    deep = getattr(found, "deepstack_features", None)  # one for each of several blocks, at the same places
    return found if not deep else deep[0][1] if isinstance(deep[0], tuple) else deep[0]


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [one for part in found for one in _tensors(part)] if isinstance(found, list | tuple) else []
