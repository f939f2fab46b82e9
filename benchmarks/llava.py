"""A real LLaVA from packages: DINOv2-small, SmolLM2-135M-Instruct, and the trained projector beside this file.

    python benchmarks/llava.py FOLDER [--cache DIR]

writes a checkpoint that ``LlavaForConditionalGeneration.from_pretrained`` loads. The two towers were trained apart and
are as their authors left them; ``llava_train.py`` made the projector (``llava_projector.md`` is its card).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import assets
import dinov2
import torch
from safetensors.torch import load_file

PROJECTOR = Path(__file__).with_name("llava_projector.safetensors")
IMAGE_SIZE = 112  # pixels: 8 × 8 patches of 14
TOKENS = (IMAGE_SIZE // dinov2.PATCH) ** 2
FEATURE_LAYER = -4  # the last blocks of this DINOv2 were tuned for saliency
IMAGE_TOKEN = "<empty_output>"  # a token of SmolLM2's vocabulary that plain text never uses


def assemble(cache: Path | None = None) -> tuple[Any, Any]:
    """The model in fp32 with a fresh projector, and its processor.

    Raises:
        AssetUnavailable: a package can't be had here.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    language_folder = assets.fetch("smollm2", cache) / "safetensors"
    vision = dinov2.build(assets.fetch("dinov2", cache) / "vit_s_focus.onnx")
    language = AutoModelForCausalLM.from_pretrained(language_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language_folder)
    tokenizer.chat_template = None  # the projector was trained on plain "Question: ... Short answer:" prompts
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        dinov2.image_processor(IMAGE_SIZE),
        tokenizer,
        patch_size=dinov2.PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


def build(folder: Path, cache: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the whole model with the stored projector into ``folder``."""
    model, processor = assemble(cache)
    model.model.multi_modal_projector.load_state_dict(load_file(PROJECTOR))
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the DINOv2 + SmolLM2 LLaVA; prints its folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, default=None, help="default: $ECOFLAP_CACHE or ~/.cache/ecoflap")
    options = parser.parse_args()
    try:
        print(build(options.folder, options.cache))
    except assets.AssetUnavailable as error:
        sys.exit(f"llava: {error}")


if __name__ == "__main__":
    main()
