"""Pictures for the types that take them in a form of their own, among the words of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from family_sweep.pictures import COUNT

Batch = dict[str, Tensor]
Form = tuple[int, Batch]  # tokens that a picture takes among the words, and the pictures


def _gemma(random: torch.Generator, pooled: int) -> Form:
    """Patches of 16 pixels in a square of six, pooled by squares of ``pooled``."""
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(1)[None].expand(COUNT, -1, -1)
    return (6 // pooled) ** 2, {
        "pixel_values": torch.rand(COUNT, 36, 768, generator=random), "image_position_ids": places,
    }  # fmt: skip


def _gemma_unified(random: torch.Generator) -> Form:
    """Patches that are embedded as they are."""
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2)).flip(1)[None].expand(COUNT, -1, -1)
    return 4, {"pixel_values": torch.rand(COUNT, 4, 3 * 48**2, generator=random), "image_position_ids": places}


def _squares(tokens: int, side: int) -> Callable[[torch.Generator], Form]:
    return lambda random: (tokens, {"pixel_values": torch.randn(COUNT, 3, side, side, generator=random)})


def _emu3(random: torch.Generator) -> Form:
    """Two rows of two visual words, each with its end."""
    sizes = torch.full((COUNT, 2), 16)
    return 6, {"pixel_values": torch.randn(COUNT, 3, 16, 16, generator=random), "image_sizes": sizes}


def _inkling(random: torch.Generator) -> Form:
    """Patches of two times; two a picture."""
    return 2, {"pixel_values": torch.randn(COUNT * 2, 2, 40, 40, 3, generator=random)}


def _inkling2(random: torch.Generator) -> Form:
    """Squares of two by two patches, four a picture."""
    return 4, {
        "pixel_values": torch.randn(COUNT * 4, 40, 40, 3, generator=random),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * COUNT),
    }  # fmt: skip


def _molmo2(random: torch.Generator) -> Form:
    """Sixteen patches, of which each token pools four."""
    return 4, {
        "pixel_values": torch.randn(COUNT, 16, 588, generator=random),
        "image_token_pooling": torch.arange(COUNT * 16).view(-1, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * COUNT), "image_num_crops": torch.ones(COUNT, dtype=torch.long),
    }  # fmt: skip


_FORMS: dict[str, Callable[[torch.Generator], Form]] = {
    "chameleon": _squares(4, 32),
    "deepseek_ocr2": _squares(145, 64),  # one token for each query, and a separator
    "diffusion_gemma": lambda random: _gemma(random, 3),
    "emu3": _emu3,
    "gemma4": lambda random: _gemma(random, 3),
    "gemma4_unified": _gemma_unified,
    "inkling2": _inkling2,
    "inkling_mm_model": _inkling,
    "molmo2": _molmo2,
    "unlimited_ocr": _squares(3, 64),  # one token, an end of its row, and a separator
}
_TOKENS = ("image_token_id", "image_patch_id")


def own_pictures(kind: str, config: Any, words: Batch, seed: int) -> Batch | None:
    """The words with a picture before each text; None for a type whose pictures come in a common form."""
    if kind not in _FORMS:
        return None
    count, pictures = _FORMS[kind](torch.Generator().manual_seed(seed))
    mapped: Any = (getattr(config, "vocabulary_map", None) or {}).get("<image>")
    token: Any = next((found for name in _TOKENS if (found := getattr(config, name, None)) is not None), mapped)
    marks = torch.full((COUNT, count), token)
    ids = torch.cat([marks, words["input_ids"].where(words["input_ids"] != token, token + 1)], dim=1)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full_like(marks, -100), words["labels"]], dim=1), **pictures,
    }  # fmt: skip
    if kind in ("gemma4", "gemma4_unified"):
        batch["mm_token_type_ids"] = (ids == token).long()
    return batch


def udop_rows(config: Any, batch: Batch) -> Tensor:
    """(samples, words + patches) bool: the real rows of what UDOP's encoder reads.

    Patches in which the middle of a word lies go into that word; as many rows at the end are padding.
    """
    side = config.image_size // config.patch_size
    places = batch["bbox"]
    cells = ((places[..., [0, 1]] + places[..., [2, 3]]) / 2 * side).long().clamp(0, side - 1)
    taken = [len(set(map(tuple, sample.tolist()))) for sample in cells]
    rows = batch["input_ids"].shape[1] + side**2
    real: Tensor = torch.arange(rows) < rows - torch.tensor(taken)[:, None]
    return real
