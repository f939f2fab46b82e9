"""Pico models and processors with random weights, one of each kind that calibration has to serve."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = [
    "Question:",
    "Short",
    "answer:",
    "USER:",
    "ASSISTANT:",
    "what",
    "color",
    "shape",
    "is",
    "the",
    "a",
    "circle",
    "square",
    "triangle",
    "red",
    "blue",
    "green",
    "yes",
    "no",
    "of",
    "picture",
    "with",
    "and",
    "on",
    "under",
    "how",
    "many",
    "one",
    "two",
    "three",
    "left",
    "right",
    "big",
    "small",
    "there",
]
CHAT = (
    "{% for m in messages %}USER: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIZE = {"height": 16, "width": 16}


def tokenizer(
    *, pad: bool = True, bos: bool = False, eos: bool = False, image: bool = False
) -> PreTrainedTokenizerFast:
    """One token a word; ``bos``/``eos``: put around every text, as LLaMA's and T5's tokenizers do."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", "<s>", *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 3), ("</s>", 1)])
    options: dict[str, Any] = {"pad_token": "<pad>"} if pad else {}
    options |= {"bos_token": "<s>"} if bos else {}
    options |= {"additional_special_tokens": ["<image>"]} if image else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **options)


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    data = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(data.numpy(), "RGB")


def _ready(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():  # some classes start parts at zero, and those could not react to anything
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def llama(vocabulary: int, positions: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _ready(LlamaForCausalLM(config))


def t5(vocabulary: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return _ready(T5ForConditionalGeneration(config))


def _small(**extra: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **extra}


def blip2(queries: int | None = 3, text: str = "t5") -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """BLIP-2 on T5 or OPT; ``queries`` is what the processor inserts, the model always wants 3."""
    words = tokenizer(eos=text == "t5")
    processor = Blip2Processor(BlipImageProcessorPil(size=SIZE), words, num_query_tokens=queries)
    texts: dict[str, dict[str, Any]] = {
        "t5": {"model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2},
        "opt": {"model_type": "opt", "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
        | _small(),
    }
    config = Blip2Config(
        vision_config=_small(image_size=16, patch_size=8),
        qformer_config=_small(encoder_hidden_size=16, vocab_size=30),
        text_config=texts[text]
        | {
            "vocab_size": len(words),
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 3,
        },
        num_query_tokens=3,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return _ready(Blip2ForConditionalGeneration(config)), processor


def clip() -> tuple[CLIPModel, CLIPProcessor]:
    words = tokenizer(eos=True)
    image = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    config = CLIPConfig(
        text_config=_small(vocab_size=len(words), max_position_embeddings=12, eos_token_id=1, bos_token_id=3),
        vision_config=_small(image_size=16, patch_size=8),
        projection_dim=16,
    )
    return _ready(CLIPModel(config)), CLIPProcessor(image, words)


def llava(chat: bool) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    words = tokenizer(pad=False, bos=True, image=True)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT if chat else None,
    )
    config = LlavaConfig(
        vision_config=_small(num_hidden_layers=2, image_size=16, patch_size=8, model_type="clip_vision_model"),
        text_config=_small(
            model_type="llama", vocab_size=len(words), num_key_value_heads=2, pad_token_id=0, eos_token_id=1
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    return _ready(LlavaForConditionalGeneration(config)), processor


def vit(classes: list[str]) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    config = ViTConfig(image_size=16, patch_size=8, **_small())
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    return _ready(ViTForImageClassification(config)), ViTImageProcessorPil(size=SIZE)
