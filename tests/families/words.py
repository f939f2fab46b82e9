"""Word-level tokenizers in the manner of each line of models, all over the vocabulary of the pico models."""

from __future__ import annotations

import picos
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

START = picos.MASK  # the start token of a decoder that reads BERT's tokenizer


def _words() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(picos.VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def text_tokenizer(end: bool = False, masks: bool = True, longest: int = 64) -> PreTrainedTokenizerFast:
    """A decoder's; with ``end``, ``</s>`` closes every text. Without ``masks``, it says nothing of its padding."""
    words = _words()
    if end:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", picos.EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"] if masks else ["input_ids"],
    )  # fmt: skip


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's: a class token in front, a separator behind, no end token."""
    words = _words()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", picos.BOS), ("</s>", picos.EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>",
        model_max_length=64,
    )  # fmt: skip
