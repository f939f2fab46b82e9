"""Configurations and processors of the pico vision-language models, sizes as small as their own rules allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers as hf
from families.vlm_words import chat, tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ecoflap.model.processor import NoVideo, without_video

SQUARE = {"height": 16, "width": 16}
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
LLAVA_CHAT = chat("USER: ", "ASSISTANT: ", "\n", "<image>\n")
CHATML = chat("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<image>")


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of."""

    config: Any
    processor: Any
    model: type


def text(words: Any, kind: str, **changes: Any) -> dict[str, Any]:
    """A text configuration that fits the tokenizer ``words``."""
    return {
        "model_type": kind, "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id,
    } | changes  # fmt: skip


def vision(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **VISION, **changes}


def identifier(words: Any, token: str) -> int:
    found = words.convert_tokens_to_ids(token)
    assert found != words.unk_token_id, token
    return int(found)


def llava() -> Parts:
    words = tokenizer(["<image>"], begin=True)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    processor = hf.LlavaProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision("clip_vision_model"), text_config=text(words, "llama"), vision_feature_layer=-2,
        image_token_index=identifier(words, "<image>"), image_seq_length=4,
    )  # fmt: skip
    return Parts(config, processor, hf.LlavaForConditionalGeneration)


def llava_next() -> Parts:
    words = tokenizer(["<image>", "[INST]", "[/INST]"], begin=True)
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = hf.LlavaNextProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("[INST] ", "[/INST] ", "</s>", "<image>\n"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=vision("clip_vision_model"), text_config=text(words, "mistral"), vision_feature_layer=-2,
        image_token_index=identifier(words, "<image>"), image_grid_pinpoints=PINPOINTS, image_seq_length=4,
    )  # fmt: skip
    return Parts(config, processor, hf.LlavaNextForConditionalGeneration)


def llava_onevision() -> Parts:
    words = tokenizer(["<image>", "<video>", "<|im_start|>"], eos="<|im_end|>")
    pictures = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = without_video(hf.LlavaOnevisionProcessor)(
        pictures, words, NoVideo({"video_processor_type": "LlavaOnevisionVideoProcessor"}), num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=CHATML.replace("<image>", "<image>\n"),
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=text(words, "qwen2"),
        image_token_index=identifier(words, "<image>"), video_token_index=identifier(words, "<video>"),
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return Parts(config, processor, hf.LlavaOnevisionForConditionalGeneration)


def _qwen(generation: str, vision_config: dict[str, Any], video: str, rope: dict[str, Any]) -> Parts:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(["<|im_start|>", *marks], eos="<|im_end|>", pad="<|endoftext|>")
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    template = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video(getattr(hf, f"{generation}Processor"))(
        pictures, words, NoVideo({"video_processor_type": video, "patch_size": 4, "merge_size": 2}),
        chat_template=template,
    )  # fmt: skip
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    ids = [identifier(words, mark) for mark in marks]
    config = getattr(hf, f"{generation}Config")(
        text_config=text(words, f"{hf_type(generation)}_text", rope_parameters=parameters, head_dim=8),
        vision_config={"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision_config},
        vision_start_token_id=ids[0], vision_end_token_id=ids[1], image_token_id=ids[2], video_token_id=ids[3],
    )  # fmt: skip
    return Parts(config, processor, getattr(hf, f"{generation}ForConditionalGeneration"))


def hf_type(generation: str) -> str:
    return {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[generation]


def qwen2_vl() -> Parts:
    vision_config = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return _qwen("Qwen2VL", vision_config, "Qwen2VLVideoProcessor", {"mrope_section": [1, 1, 2]})


def qwen2_5_vl() -> Parts:
    """Windows of 2 x 2 merged patches, full attention in the second block alone."""
    vision_config = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "window_size": 16,
        "fullatt_block_indexes": [1], "out_hidden_size": 32,
    }  # fmt: skip
    return _qwen("Qwen2_5_VL", vision_config, "Qwen2VLVideoProcessor", {"mrope_section": [1, 1, 2]})


def qwen3_vl() -> Parts:
    """Features of the first and third vision block go to the first two language blocks."""
    vision_config = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 2], "out_hidden_size": 32,
    }  # fmt: skip
    rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return _qwen("Qwen3VL", vision_config, "Qwen3VLVideoProcessor", rope)


_ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_IDEFICS_CHAT = chat("User: ", "Assistant: ", "<end_of_utterance>\n", "<image>", begin="<|im_start|>")
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def idefics3() -> Parts:
    """Pictures are cut into tiles of 16 pixels beside a small copy of the whole; 4 tokens each."""
    special = ["<image>", "<fake_token_around_image>", "<global-img>", *_ROWS]
    words = tokenizer([*special, "<end_of_utterance>"], bos="<|im_start|>")
    processor = hf.Idefics3Processor(
        Idefics3ImageProcessorPil(**_SPLIT), words, image_seq_len=4, chat_template=_IDEFICS_CHAT
    )
    config = hf.Idefics3Config(
        vision_config=vision("idefics3_vision", patch_size=4), text_config=text(words, "llama"), scale_factor=2,
        image_token_id=identifier(words, "<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return Parts(config, processor, hf.Idefics3ForConditionalGeneration)


def smolvlm() -> Parts:
    special = ["<image>", "<fake_token_around_image>", "<global-img>", *_ROWS]
    words = tokenizer(special, bos="<|im_start|>", eos="<end_of_utterance>")
    settings = {
        "video_processor_type": "SmolVLMVideoProcessor",
        "video_sampling": {"max_frames": 2, "fps": 1, "video_size": {"longest_edge": 16}},
        "size": {"longest_edge": 16},
    }
    processor = without_video(hf.SmolVLMProcessor)(
        SmolVLMImageProcessorPil(**_SPLIT), words, NoVideo(settings), image_seq_len=4, chat_template=_IDEFICS_CHAT
    )
    config = hf.SmolVLMConfig(
        vision_config=vision("smolvlm_vision", patch_size=4), text_config=text(words, "llama"), scale_factor=2,
        image_token_id=identifier(words, "<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return Parts(config, processor, hf.SmolVLMForConditionalGeneration)


def paligemma() -> Parts:
    """No chat template: a prefix seen whole, a suffix to be said."""
    words = tokenizer(["<image>"], eos="<eos>", bos="<bos>")
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(pictures, words)
    config = hf.PaliGemmaConfig(
        vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=text(words, "gemma", head_dim=8), projection_dim=32, hidden_size=32,
        image_token_index=identifier(words, "<image>"), vocab_size=len(words),
    )  # fmt: skip
    return Parts(config, processor, hf.PaliGemmaForConditionalGeneration)


def gemma3() -> Parts:
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(["<start_of_turn>", "<end_of_turn>"], named=marks, eos="<eos>", bos="<bos>", begin=True)
    template = chat(
        "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n", "<start_of_image>", begin="<bos>"
    )
    processor = hf.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), words, image_seq_length=4, chat_template=template
    )
    config = hf.Gemma3Config(
        vision_config=vision("siglip_vision_model", patch_size=4, vision_use_head=False),
        text_config=text(
            words, "gemma3_text", head_dim=8, sliding_window=8, query_pre_attn_scalar=8, num_hidden_layers=3,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4, boi_token_index=identifier(words, "<start_of_image>"),
        eoi_token_index=identifier(words, "<end_of_image>"),
        image_token_index=identifier(words, "<image_soft_token>"),
    )  # fmt: skip
    return Parts(config, processor, hf.Gemma3ForConditionalGeneration)


def internvl() -> Parts:
    marks = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    words = tokenizer(["<|im_start|>"], named=marks, eos="<|im_end|>")
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = without_video(hf.InternVLProcessor)(
        pictures, words, NoVideo({"video_processor_type": "InternVLVideoProcessor", "size": SQUARE}),
        image_seq_length=4, chat_template=CHATML.replace("<image>", "<IMG_CONTEXT>\n"),
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
        text_config=text(words, "qwen2"), image_token_id=identifier(words, "<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    return Parts(config, processor, hf.InternVLForConditionalGeneration)


def mllama() -> Parts:
    """Pictures of one or two tiles, seen by the second language block alone, through cross-attention."""
    special = ["<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>"]
    words = tokenizer(special, bos="<|begin_of_text|>", eos="<|eot_id|>", begin=True)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    template = chat(head.format("user"), head.format("assistant"), "<|eot_id|>", "<|image|>", begin="<|begin_of_text|>")
    processor = hf.MllamaProcessor(MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2), words, template)
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 2, "vision_output_dim": 32,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text(
            words, "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=identifier(words, "<|image|>"),
    )  # fmt: skip
    return Parts(config, processor, hf.MllamaForConditionalGeneration)


def florence2() -> Parts:
    """A convolutional vision tower of two stages, and a BART that reads picture and prompt."""
    words = tokenizer(named={"image_token": "<image>"}, begin=True, end=True)
    pictures = CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)
    pictures.image_seq_length = 5  # 2 x 2 patches and their mean
    processor = hf.Florence2Processor(pictures, words)
    config = hf.Florence2Config(
        vision_config={
            "depths": [1, 2], "patch_size": [3, 3], "patch_stride": [4, 2], "patch_padding": [1, 1],
            "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
            "window_size": 2, "projection_dim": 16, "drop_path_rate": 0.0,
        },
        text_config={
            "model_type": "bart", "vocab_size": len(words), "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
            "max_position_embeddings": 128, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "decoder_start_token_id": words.eos_token_id,
            "forced_eos_token_id": None,
        },
        image_token_id=identifier(words, "<image>"),
    )  # fmt: skip
    return Parts(config, processor, hf.Florence2ForConditionalGeneration)


def kosmos2() -> Parts:
    """The processor puts 64 image positions in front of the text, and a mask that marks them."""
    words = tokenizer()
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    processor = hf.Kosmos2Processor(pictures, words, num_patch_index_tokens=4)
    config = hf.Kosmos2Config(
        vision_config=vision("kosmos_2_vision_model"),
        text_config={
            "vocab_size": len(words), "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4,
            "max_position_embeddings": 256, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        latent_query_num=64,
    )  # fmt: skip
    return Parts(config, processor, hf.Kosmos2ForConditionalGeneration)


@cache
def parts(make: Callable[[], Parts]) -> Parts:
    """Made once; neither configuration nor processor is changed by anyone."""
    return make()
