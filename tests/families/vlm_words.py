"""Tokenizers and chat templates of the pico vision-language models: one token a word, special tokens as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "question answer short user assistant model system what which how many color shape is are there the a an of in on "
    "and with left right above below picture image describe caption red blue green yellow white black circle square "
    "triangle star cat dog house tree small big one two three four yes no Question Short User Assistant USER ASSISTANT "
    "What does image describe Here original crops to help you see better some original : ? . , < >"
)


def tokenizer(
    special: Sequence[str] = (),
    *,
    begin: bool = False,
    end: bool = False,
    named: dict[str, str] | None = None,
    words: Sequence[str] = (),
    pad: str = "<pad>",
    eos: str = "</s>",
    bos: str = "<s>",
) -> PreTrainedTokenizerFast:
    """A tokenizer over ``WORDS``, line breaks and punctuation.

    Args:
        special: further special tokens; ``words``: further plain words.
        begin, end: whether it puts ``bos`` and ``eos`` around a text, as LLaMA's and BART's do.
        named: attributes of the tokenizer that hold a special token ("image_token": "<image>").
    """
    named = named or {}
    listed = [pad, eos, bos, "<unk>", *special, *named.values(), "\n", *WORDS.split(), *words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(listed))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    first, last = (f"{bos} " if begin else ""), (f" {eos}" if end else "")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}",
        pair=f"{first}$A{last} $B:1{last}",
        special_tokens=[(token, vocabulary[token]) for token in (bos, eos)],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, bos_token=bos, unk_token="<unk>", model_max_length=512,
        extra_special_tokens=named,
    )  # fmt: skip
    made.add_tokens(list(special), special_tokens=True)
    return made


def chat(user: str, assistant: str, close: str, image: str, begin: str = "", turn: str = "") -> str:
    """A chat template in the manner of the published ones.

    Args:
        user, assistant: what opens a turn; ``close`` ends it; ``image`` announces a picture.
        begin: stands before everything; ``turn`` before every turn.
    """
    template = (
        f"{begin}{{% for message in messages %}}{turn}"
        f"{{% if message['role'] == 'assistant' %}}{assistant}{{% else %}}{user}{{% endif %}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{% endif %}}{close}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{turn}{assistant}{{% endif %}}"
    )
    return template.replace("\n", "{{ '\\n' }}")  # a bare line break behind a block is lost


def picture(number: int, width: int, height: int) -> Image.Image:
    """Noise in colours, drawn from ``number``."""
    generator = torch.Generator().manual_seed(number)
    data = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(data.numpy())


def save(processor: Any, model: Any, folder: Any) -> None:
    """Both into one folder, as a checkpoint."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
