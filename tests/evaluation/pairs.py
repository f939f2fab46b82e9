"""Pico models that see and read beside those of calibration's tests: BLIP, BLIP-2 for retrieval, SigLIP, ViLT; data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pico import SIZE, WORDS, picture
from picos import scramble
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

VOCABULARY = {
    word: i
    for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", "<s>", "<image>", "true", "false", *WORDS]))
}


def words(first: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """One token a word, in BERT's manner: ``<s> ... </s>``, the start left out without ``first``."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' if first else ''}$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 3), ("</s>", 1)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "additional_special_tokens": ["<image>"]}
    names |= {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>"} if first else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **names, **options)


def _small(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


def _images() -> dict[str, Any]:
    return _small(image_size=16, patch_size=8)


def _text(**more: Any) -> dict[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "sep_token_id": 1}
    return _small(vocab_size=len(VOCABULARY), max_position_embeddings=32, **special, **more)


def blip(task: str) -> tuple[Any, BlipProcessor]:
    """BLIP for ``questions``, ``captions`` or ``retrieval``."""
    classes = {
        "questions": BlipForQuestionAnswering,
        "captions": BlipForConditionalGeneration,
        "retrieval": BlipForImageTextRetrieval,
    }
    text = _text(encoder_hidden_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = BlipConfig(text_config=text, vision_config=_images(), image_text_hidden_size=8)
    return scramble(classes[task](config)), BlipProcessor(BlipImageProcessorPil(size=SIZE), words())


def blip2_retrieval() -> tuple[Any, Blip2Processor]:
    qformer = _small(encoder_hidden_size=16, vocab_size=len(VOCABULARY), use_qformer_text_input=True)
    config = Blip2Config(
        vision_config=_images(), qformer_config=qformer, num_query_tokens=3, image_text_hidden_size=8,
        image_token_index=VOCABULARY["<image>"],
    )  # fmt: skip
    return scramble(Blip2ForImageTextRetrieval(config)), Blip2Processor(
        BlipImageProcessorPil(size=SIZE), words(), num_query_tokens=3
    )


def siglip() -> tuple[Any, SiglipProcessor]:
    """Its text tower reads its last position, whatever stands there, so that texts are filled up to one length."""
    config = SiglipConfig(text_config=_text(projection_size=16), vision_config=_images())
    config.text_config.max_position_embeddings = 16
    model = SiglipModel(config)
    return scramble(model), SiglipProcessor(SiglipImageProcessorPil(size=SIZE), words(first=False))


def vilt(seed: int = 0) -> tuple[Any, ViltProcessor]:
    config = ViltConfig(
        **_small(vocab_size=len(VOCABULARY), max_position_embeddings=16, image_size=32, patch_size=16),
        num_images=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: "False", 1: "True"}, label2id={"False": 0, "True": 1}, modality_type_vocab_size=3,
    )  # fmt: skip
    images = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16)
    return scramble(ViltForImagesAndTextClassification(config), seed), ViltProcessor(images, words())


def picture_file(folder: Path, number: int) -> str:
    """Picture ``number`` as a file; its name."""
    name = f"{number}.png"
    picture(number).save(folder / name)
    return name


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def texts(count: int, seed: int = 0, shortest: int = 2, longest: int = 7) -> list[str]:
    """Texts of random words and lengths, all different."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        found[" ".join(WORDS[i] for i in picks)] = None
    return list(found)
