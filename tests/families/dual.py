"""Two parallel towers at pico size: contrastive models, of square pictures and of any shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import picos
import torch
import transformers
from families.family import Family
from families.words import bert_tokenizer, text_tokenizer
from torch import Tensor, nn
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

SIZE = {"height": picos.IMAGE, "width": picos.IMAGE}
TEXT = {
    "vocab_size": len(picos.VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": picos.PAD, "eos_token_id": picos.EOS,
    "bos_token_id": picos.BOS,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": picos.IMAGE, "patch_size": picos.PATCH,
}  # fmt: skip
TOWERS = (("vision", 3), ("language", 2))
MOST_PATCHES, PATCH = 6, 16  # SigLIP2's processor insists on patches of 16


def _build(name: str, text: dict[str, Any], vision: dict[str, Any], extra: dict[str, Any], seed: int = 0) -> nn.Module:
    """``transformers.<name>Model`` of ``<name>Config``, every weight drawn from ``seed``."""
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **extra)
    return picos.scramble(getattr(transformers, f"{name}Model")(config), seed)


def _pair(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    """A picture, and a text between its start and end tokens."""
    count = int(torch.randint(3, 8, (1,), generator=generator)) if padding else 7
    words = torch.randint(picos.FIRST_WORD, len(picos.VOCABULARY), (count,), generator=generator).tolist()
    ids = [picos.BOS, *words, picos.EOS]
    rest = 9 - len(ids)
    return {
        "pixel_values": torch.randn(3, picos.IMAGE, picos.IMAGE, generator=generator),
        "input_ids": torch.tensor(ids + [picos.PAD] * rest),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * rest),
    }


def _patches(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    """The same with the picture as a row of patches, of another shape and padded to the longest."""
    rows, columns = ((1, 3), (2, 2))[int(torch.randint(2, (1,), generator=generator))] if padding else (2, 3)
    patches = torch.randn(MOST_PATCHES, 3 * PATCH**2, generator=generator)
    real = (torch.arange(MOST_PATCHES) < rows * columns).long()
    return {
        **_pair(generator, padding),
        "pixel_values": patches * real[:, None],
        "pixel_attention_mask": real,
        "spatial_shapes": torch.tensor([rows, columns]),
    }


def _family(
    name: str,
    model: str,
    processor: Callable[[], Any],
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    towers: tuple[tuple[str, int], ...] = TOWERS,
    sample: Callable[[torch.Generator, bool], dict[str, Tensor]] = _pair,
    **extra: Any,
) -> Family:
    build = partial(_build, model, {**TEXT, **(text or {})}, {**VISION, **(vision or {})}, extra)
    batches = picos.Family(name, build, sample, {"return_loss": True}).batches
    return Family(name, build, batches, towers, processor)


def _clip_images() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": picos.IMAGE}, crop_size=SIZE)


# An EfficientNet of one repeat: convolutions, which are no blocks of linear layers.
EFFICIENTNET = {
    "image_size": picos.IMAGE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 16,
    "kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [1], "num_block_repeats": [1],
    "expand_ratios": [1],
}  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    _family(
        "clip", "CLIP", lambda: transformers.CLIPProcessor(_clip_images(), text_tokenizer(end=True)),
        text={"projection_dim": 16}, vision={"projection_dim": 16}, projection_dim=16,
    ),
    _family(
        "siglip", "Siglip",
        # As its tokenizer does: no attention mask, since it has learnt on texts padded to one length.
        lambda: transformers.SiglipProcessor(
            SiglipImageProcessorPil(size=SIZE), text_tokenizer(end=True, masks=False)
        ),
        text={"projection_size": 24},
    ),
    _family(
        "siglip2", "Siglip2",
        lambda: transformers.Siglip2Processor(
            Siglip2ImageProcessorPil(patch_size=PATCH),
            text_tokenizer(end=True, longest=16),
        ),
        text={"projection_size": 24}, vision={"num_patches": 9, "patch_size": PATCH}, sample=_patches,
    ),
    _family(
        "altclip", "AltCLIP", lambda: transformers.AltCLIPProcessor(_clip_images(), bert_tokenizer()),
        text={"project_dim": 16, "max_position_embeddings": 24}, projection_dim=16,
    ),
    _family(
        "chinese_clip", "ChineseCLIP",
        lambda: transformers.ChineseCLIPProcessor(
            ChineseCLIPImageProcessorPil(size=SIZE, crop_size=SIZE), bert_tokenizer()
        ),
        projection_dim=16,
    ),
    _family(
        "align", "Align",
        lambda: transformers.AlignProcessor(
            EfficientNetImageProcessorPil(size=SIZE, crop_size=SIZE), bert_tokenizer()
        ),
        vision=EFFICIENTNET, towers=(("language", 2),), projection_dim=8,
    ),
)  # fmt: skip
