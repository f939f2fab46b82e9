"""The word-level tokenizer and the BLIP-2 processor of the embedded VLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, END, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"
FILLER = "."


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token a word or punctuation mark of ``texts``, lower-cased.

    Ids: 0 pad, 1 end (appended to every text), 2 unknown, 3 image placeholder, then the words in alphabetical order.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, IMAGE, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return tokenizer


def build_processor(tokenizer: Any, num_query_tokens: int, image_size: int) -> Any:
    """A ``Blip2Processor`` that puts ``num_query_tokens`` placeholders in front of the text; needs no torchvision."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    images = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
    return Blip2Processor(images, tokenizer, num_query_tokens=num_query_tokens)
