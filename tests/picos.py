"""Pico models of every supported family: transformers' own classes, hidden size 16-32, seeded, built in milliseconds.

Weights are drawn so that every part matters: matrices keep the scale of their input, embeddings, position tables and
query tokens are of order one, biases and norms are not trivial. ``FAMILIES[name].batches(...)`` are inputs with labels
for which ``model(**batch).loss`` works; ``write_checkpoint`` makes a folder that ``from_pretrained`` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

IMAGE, PATCH, PATCHES, QUERIES, CLASSES = 16, 8, 4, 3, 5
PAD, EOS, BOS, UNKNOWN, IMAGE_TOKEN, MASK = range(6)
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<image>", "<mask>"]
WORDS = [
    "what",
    "color",
    "shape",
    "is",
    "the",
    "a",
    "there",
    "in",
    "image",
    "question",
    "answer",
    ":",
    "?",
    ".",
    ",",
    "short",
    "yes",
    "no",
    "red",
    "blue",
    "green",
    "yellow",
    "circle",
    "triangle",
    "square",
    "star",
    "many",
    "one",
    "two",
    "three",
    "left",
    "right",
    "of",
    "above",
    "below",
    "and",
    "object",
    "objects",
    "picture",
    "how",
    "small",
    "large",
]
VOCABULARY = [*SPECIAL, *WORDS, *[f"w{i}" for i in range(64 - len(SPECIAL) - len(WORDS))]]  # 64 tokens
FIRST_WORD = len(SPECIAL)
LONGEST, LONGEST_TARGET = 9, 5  # tokens of a text and of a target, before image placeholders
Batch = dict[str, Any]  # tensors, and return_loss=True for CLIP


@dataclass(frozen=True)
class Family:
    """One architecture: ``build(seed=0)`` makes the model; ``batches(n, batch_size, padding, seed)`` its inputs."""

    name: str
    build: Callable[..., PreTrainedModel]
    sample: Callable[[torch.Generator, bool], dict[str, Tensor]]
    extra: dict[str, Any]

    def batches(self, n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0) -> list[Batch]:
        """``n`` samples in batches of ``batch_size``, CPU tensors; the samples don't depend on ``batch_size``.

        With ``padding``, texts differ in length and are padded to a fixed length with ``attention_mask`` 0 and
        label -100; without, all are of full length and ``attention_mask`` is all ones.
        """
        samples = [self.sample(torch.Generator().manual_seed(1000 * seed + i), padding) for i in range(n)]
        return [self._collate(samples[i : i + batch_size]) for i in range(0, n, batch_size)]

    def _collate(self, samples: list[dict[str, Tensor]]) -> Batch:
        return {key: torch.stack([s[key] for s in samples]).contiguous() for key in samples[0]} | self.extra


def batches(name: str, n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0) -> list[Batch]:
    """``FAMILIES[name].batches(...)``."""
    return FAMILIES[name].batches(n, batch_size, padding, seed)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter from ``seed`` at a scale at which it matters (see the module's docstring); eval mode."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # ties come once
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.fill_(1.5)
            elif "relative_attention_bias" in name:
                parameter.copy_(2.0 * noise)  # strong: a block that loses its position bias shows
            elif id(parameter) in embeddings or any(k in name for k in ("embedding", "token", "position")):
                parameter.copy_((0.5 if parameter.shape[-1] > 1 else 1.0) * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() < 2:
                parameter.copy_(1.0 + 0.1 * noise)  # norms
            else:
                conv1d = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
                fan_in = parameter.shape[0] if conv1d else parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
    return model.eval()


# --- samples -------------------------------------------------------------------------------------------------------


def _words(generator: torch.Generator, longest: int, padding: bool) -> list[int]:
    count = int(torch.randint(longest // 2, longest + 1, (1,), generator=generator)) if padding else longest
    return torch.randint(FIRST_WORD, len(VOCABULARY), (count,), generator=generator).tolist()


def _padded(ids: list[int], length: int, fill: int) -> Tensor:
    return torch.tensor(ids + [fill] * (length - len(ids)))


def _text(generator: torch.Generator, padding: bool, prefix: int = 0) -> dict[str, Tensor]:
    """A text, after ``prefix`` image placeholders, padded on the right."""
    ids = [IMAGE_TOKEN] * prefix + _words(generator, LONGEST, padding)
    length = prefix + LONGEST
    return {"input_ids": _padded(ids, length, PAD), "attention_mask": _padded([1] * len(ids), length, 0)}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, IMAGE, IMAGE, generator=generator)}


def _seq2seq(generator: torch.Generator, padding: bool, prefix: int = 0) -> dict[str, Tensor]:
    text = _text(generator, padding, prefix)
    target = [*_words(generator, LONGEST_TARGET - 1, padding), EOS]
    return {**text, "labels": _padded(target, LONGEST_TARGET, -100)}


def _causal(generator: torch.Generator, padding: bool, prefix: int = 0) -> dict[str, Tensor]:
    text = _text(generator, padding, prefix)
    ignored = (text["attention_mask"] == 0) | (text["input_ids"] == IMAGE_TOKEN)
    return {**text, "labels": text["input_ids"].masked_fill(ignored, -100)}


def _masked(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    text = _text(generator, padding)
    hidden = (torch.arange(LONGEST) % 3 == 1) & (text["attention_mask"] == 1)
    return {
        **text,
        "input_ids": text["input_ids"].masked_fill(hidden, MASK),
        "labels": text["input_ids"].masked_fill(~hidden, -100),
    }


def _classified(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    return {**_image(generator), "labels": torch.randint(CLASSES, (), generator=generator)}


def _contrastive(generator: torch.Generator, padding: bool) -> dict[str, Tensor]:
    ids = [BOS, *_words(generator, LONGEST - 2, padding), EOS]
    mask = _padded([1] * len(ids), LONGEST, 0)
    return {**_image(generator), "input_ids": _padded(ids, LONGEST, PAD), "attention_mask": mask}


# --- models --------------------------------------------------------------------------------------------------------

_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=16,
        decoder_start_token_id=PAD, **_IDS,
    )  # fmt: skip


def _blip2(language: Any, seed: int) -> PreTrainedModel:
    vision = Blip2VisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE,
        patch_size=PATCH, initializer_range=0.02,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        encoder_hidden_size=24, cross_attention_frequency=2, initializer_range=0.02,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=language, num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return scramble(Blip2ForConditionalGeneration(config), seed)


def blip2_t5(seed: int = 0) -> PreTrainedModel:
    return _blip2(_t5_config(), seed)


def blip2_opt(seed: int = 0) -> PreTrainedModel:
    language = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, **_IDS,
    )  # fmt: skip
    return _blip2(language, seed)


def _llama_config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, **_IDS,
    )  # fmt: skip


def _clip_vision() -> dict[str, Any]:
    return {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": IMAGE, "patch_size": PATCH, "projection_dim": 16,
    }  # fmt: skip


def llava(seed: int = 0) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_clip_vision()), text_config=_llama_config(tied=False),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )  # fmt: skip
    return scramble(LlavaForConditionalGeneration(config), seed)


def clip(seed: int = 0) -> PreTrainedModel:
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, **_IDS,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=_clip_vision(), projection_dim=16)
    return scramble(CLIPModel(config), seed)


def vit(seed: int = 0) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE,
        patch_size=PATCH, num_labels=CLASSES,
    )  # fmt: skip
    return scramble(ViTForImageClassification(config), seed)


def t5(seed: int = 0) -> PreTrainedModel:
    return scramble(T5ForConditionalGeneration(_t5_config()), seed)


def llama(seed: int = 0, tied: bool = True) -> PreTrainedModel:
    return scramble(LlamaForCausalLM(_llama_config(tied)), seed)


def gpt2(seed: int = 0) -> PreTrainedModel:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **_IDS)
    return scramble(GPT2LMHeadModel(config), seed)


def bert(seed: int = 0) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=PAD,
    )  # fmt: skip
    return scramble(BertForMaskedLM(config), seed)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("blip2_t5", blip2_t5, lambda g, p: {**_image(g), **_seq2seq(g, p, QUERIES)}, {}),
        Family("blip2_opt", blip2_opt, lambda g, p: {**_image(g), **_causal(g, p, QUERIES)}, {}),
        Family("llava", llava, lambda g, p: {**_image(g), **_causal(g, p, PATCHES)}, {}),
        Family("clip", clip, _contrastive, {"return_loss": True}),
        Family("vit", vit, _classified, {}),
        Family("t5", t5, _seq2seq, {}),
        Family("llama", llama, _causal, {}),
        Family("gpt2", gpt2, _causal, {}),
        Family("bert", bert, _masked, {}),
    )
}


# --- folders -------------------------------------------------------------------------------------------------------


def tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``VOCABULARY``; with ``end`` it appends ``</s>`` as T5's does."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        mask_token="<mask>", additional_special_tokens=["<image>"], model_max_length=64,
    )  # fmt: skip


def processor(name: str) -> Any:
    """What a checkpoint of this family comes with: a processor, tokenizer or image processor."""
    size = {"height": IMAGE, "width": IMAGE}
    clip_images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=size)
    if name in ("blip2_t5", "blip2_opt"):
        words = tokenizer(end=name == "blip2_t5")
        return Blip2Processor(BlipImageProcessorPil(size=size), words, num_query_tokens=QUERIES)
    if name == "llava":
        return LlavaProcessor(
            clip_images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
            image_token="<image>", num_additional_image_tokens=1,
        )  # fmt: skip
    if name == "clip":
        return CLIPProcessor(clip_images, tokenizer(end=True))
    if name == "vit":
        return ViTImageProcessorPil(size=size)
    return tokenizer(end=name == "t5")


def write_checkpoint(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: int | str = "50GB", seed: int = 0
) -> Path:
    """Save a pico model with its processor into ``folder`` by transformers' own ``save_pretrained``; the folder."""
    FAMILIES[name].build(seed=seed).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    processor(name).save_pretrained(folder)
    return folder
