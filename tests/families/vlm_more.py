"""Configurations and processors of further vision-language models: packed patches, resamplers, tiles, visual words."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from families.family import Batches
from families.vlm_models import CHATML, SQUARE, Parts, identifier, parts, text, vision
from families.vlm_words import chat, tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from ecoflap.model.processor import NoVideo, without_video


def idefics2() -> Parts:
    """Pictures keep their shape; a perceiver makes 4 tokens of each."""
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    words = tokenizer(special, begin=True)
    pictures = Idefics2ImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 16}, do_image_splitting=False)
    template = chat("User: ", "Assistant: ", "<end_of_utterance>\n", "<image>")
    processor = hf.Idefics2Processor(pictures, words, image_seq_len=4, chat_template=template)
    config = hf.Idefics2Config(
        vision_config=vision("idefics2_vision", patch_size=4), text_config=text(words, "mistral", head_dim=8),
        perceiver_config={
            "model_type": "idefics2_perceiver", "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2,
            "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        image_token_id=identifier(words, "<image>"),
    )  # fmt: skip
    return Parts(config, processor, hf.Idefics2ForConditionalGeneration)


def mistral3() -> Parts:
    """Pixtral: patches of pictures of any shape in one sequence, merged two by two. Its processor needs torchvision."""
    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], begin=True)
    config = hf.Mistral3Config(
        vision_config=vision("pixtral", image_size=32, patch_size=4, head_dim=12),
        text_config=text(words, "mistral", head_dim=8), spatial_merge_size=2, vision_feature_layer=-1,
        image_token_index=identifier(words, "[IMG]"), tie_word_embeddings=False,
    )  # fmt: skip
    return Parts(config, words, hf.Mistral3ForConditionalGeneration)


def mistral3_batches(n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0) -> Batches:
    """As PixtralProcessor makes them: pictures padded to the largest, a mark at the end of each row of patches."""
    words: Any = parts(mistral3).processor
    image, line, end = (identifier(words, mark) for mark in ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    sizes = ((16, 16), (8, 24), (24, 8), (16, 24)) if padding else ((16, 24),) * 4
    rows = []
    for number in range(n):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        height, width = sizes[number % 4]
        shown = ([image] * (width // 8) + [line]) * (height // 8)
        said = torch.randint(10, len(words), (3 + (number % 3 if padding else 0),), generator=generator)
        ids = torch.cat([torch.tensor([words.bos_token_id, *shown[:-1], end]), said])
        labels = torch.cat([torch.full((len(ids) - len(said),), -100), said])
        pixels = torch.zeros(3, 24, 24)
        pixels[:, :height, :width] = torch.randn(3, height, width, generator=generator)
        rows.append((ids, labels, pixels, torch.tensor([height, width])))
    found = []
    for chunk in (rows[start : start + batch_size] for start in range(0, n, batch_size)):
        ids, labels, pixels, shapes = zip(*chunk, strict=True)
        tall, wide = torch.stack(shapes).amax(dim=0).tolist()
        found.append({
            "input_ids": pad_sequence(list(ids), batch_first=True, padding_value=words.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=-100),
            "pixel_values": torch.stack(pixels)[:, :, :tall, :wide].contiguous(),
            "image_sizes": torch.stack(shapes),
        })  # fmt: skip
    return found


def glm4v() -> Parts:
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
             "<|video|>")  # fmt: skip
    words = tokenizer(["<|im_start|>", *marks], eos="<|im_end|>")
    pictures = Glm4vImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
    )
    processor = without_video(hf.Glm4vProcessor)(
        pictures, words, NoVideo({"video_processor_type": "Glm4vVideoProcessor"}),
        chat_template=CHATML.replace("<image>", "<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip
    names = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id",
             "image_token_id", "video_token_id")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = hf.Glm4vConfig(
        text_config=text(words, "glm4v_text", rope_parameters=rope, head_dim=8),
        vision_config={
            "depth": 3, "hidden_size": 16, "num_heads": 2, "image_size": 16, "patch_size": 4, "out_hidden_size": 32,
            "intermediate_size": 24, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        **{name: identifier(words, mark) for name, mark in zip(names, marks, strict=True)},
    )  # fmt: skip
    return Parts(config, processor, hf.Glm4vForConditionalGeneration)


def aya_vision() -> Parts:
    tiles = [f"TILE_{number}" for number in range(1, 5)]
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    words = tokenizer([*marks, *tiles, "<|START|>"], begin=True, eos="<|END|>", bos="<BOS>")
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    template = chat("<|START|>user ", "<|START|>assistant ", "<|END|>", "<image>", begin="<BOS>")
    processor = hf.AyaVisionProcessor(
        pictures, words, patch_size=4, img_size=16, downsample_factor=2, chat_template=template
    )
    config = hf.AyaVisionConfig(
        vision_config=vision("siglip_vision_model", patch_size=4, vision_use_head=False),
        text_config=text(words, "cohere2", sliding_window=16, head_dim=8), downsample_factor=2,
        image_token_index=identifier(words, "<|IMG_PATCH|>"),
    )  # fmt: skip
    return Parts(config, processor, hf.AyaVisionForConditionalGeneration)


def ovis2() -> Parts:
    """Patches become mixtures of a visual vocabulary."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer(["<image>", "<IMG_ATOM>", *marks, "<|im_start|>"], eos="<|im_end|>")
    pictures = Ovis2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=4)
    processor = hf.Ovis2Processor(pictures, words, chat_template=CHATML, image_seq_length=4)
    config = hf.Ovis2Config(
        vision_config=vision("ovis2_vision", patch_size=4, hidden_stride=2, vocab_size=32),
        text_config=text(words, "qwen2"), image_token_id=identifier(words, "<IMG_ATOM>"),
        visual_indicator_token_ids=[identifier(words, mark) for mark in marks], vocab_size=len(words), hidden_size=32,
    )  # fmt: skip
    return Parts(config, processor, hf.Ovis2ForConditionalGeneration)
