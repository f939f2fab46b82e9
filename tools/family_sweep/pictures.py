"""Pictures in the forms in which families take them: squares, tiles of squares, and patches with their grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

COUNT = 2  # pictures, one for each sample
SIDE = 4  # of a picture, in patches


def vision_of(config: Any) -> Any:
    """The configuration of the part that sees pictures."""
    for name in ("vision_config", "vision", "image_config", "visual_config", "encoder"):
        if (found := getattr(config, name, None)) is not None:
            return vision_of(found) if getattr(found, "vision_config", None) is not None else found
    return config


def candidates(config: Any, takes: Mapping[str, Any], seed: int) -> Iterator[dict[str, Tensor]]:
    """Arguments that a model may take for two pictures.

    Args:
        takes: the names of all arguments that it has for them.
    """
    random = torch.Generator().manual_seed(seed)
    vision = vision_of(config)
    patch, channels = getattr(vision, "patch_size", 14), getattr(vision, "num_channels", None) or 3
    patch = patch if isinstance(patch, int) else patch[0]
    for pictures in (*_squares(vision, patch, channels, random), *_patches(vision, patch, channels, takes, random)):
        extras = _extras(config, takes, pictures["pixel_values"], patch, random)
        yield {**extras, **pictures}
        if extras:
            yield pictures


def _squares(vision: Any, patch: int, channels: int, random: torch.Generator) -> Iterator[dict[str, Tensor]]:
    size = getattr(vision, "image_size", None)
    for side in dict.fromkeys(one for one in (size, SIDE * patch) if isinstance(one, int)):
        for shape in (
            (COUNT, channels, side, side),
            (COUNT, 1, channels, side, side),
            (COUNT, 2, channels, side, side),
            (COUNT, 3, channels, side, side),  # two tiles and the whole
            (COUNT, 2, side, side, channels),  # two times, channels last
        ):
            yield {"pixel_values": torch.randn(shape, generator=random)}


def _patches(
    vision: Any, patch: int, channels: int, takes: Mapping[str, Any], random: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    grids = {name for name in ("image_grid_thw", "grid_thws", "grid_thw", "image_grid_hw") if name in takes}
    count = SIDE * SIDE
    grid = {
        name: torch.tensor([[SIDE, SIDE] if name == "image_grid_hw" else [1, SIDE, SIDE]] * COUNT) for name in grids
    }
    for times in dict.fromkeys((getattr(vision, "temporal_patch_size", None) or 1, 1, 2)):
        size = channels * times * patch * patch
        if grids:
            flat = torch.randn(COUNT * count, size, generator=random)
            yield {"pixel_values": flat, **grid}
            yield {"pixel_values": flat.view(-1, channels * times, patch, patch), **grid}
            yield {"pixel_values": flat.view(-1, patch, patch, channels * times)[..., :channels], **grid}
        yield {"pixel_values": torch.randn(COUNT, count, size, generator=random)}
    if "image_grid_thw" in takes:  # lines of pixels, channels last
        yield {"pixel_values": torch.randn(COUNT * count * patch * patch, channels, generator=random), **grid}


def _extras(
    config: Any, takes: Mapping[str, Any], pixels: Tensor, patch: int, random: torch.Generator
) -> dict[str, Tensor]:
    """What some families ask for beside the pixels."""
    count = SIDE * SIDE
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).flip(1)[None]
    high = getattr(getattr(config, "high_res_vision_config", None), "image_size", 0)
    wide = pixels.dim() == 5 and pixels.shape[1] == 3
    size = [pixels.shape[-1], 2 * pixels.shape[-1]] if wide else [pixels.shape[-1]] * 2
    known = {
        "image_sizes": torch.tensor([size] * COUNT),
        "spatial_shapes": torch.full((COUNT, 2), SIDE),
        "pixel_attention_mask": torch.ones(COUNT, count, dtype=torch.long)
        if "spatial_shapes" in takes
        else torch.ones(pixels.shape[:-3] or (1,), dtype=torch.bool),
        "image_merge_sizes": torch.ones(COUNT, dtype=torch.long),
        "image_position_ids": places.expand(COUNT, -1, -1),
        "high_res_pixel_values": torch.randn(COUNT, 3, high, high, generator=random) if high else None,
    }
    return {name: value for name, value in known.items() if name in takes and value is not None}
