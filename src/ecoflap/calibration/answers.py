"""What the BLIP line needs beside the usual: answers for its own decoder, start tokens, the Q-Former's instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ecoflap.calibration.models import is_encoder_decoder, parameters_of, text_config
from ecoflap.calibration.padding import IGNORED
from ecoflap.calibration.pairs import encode_pairs
from ecoflap.calibration.prompts import tokenizer_of
from ecoflap.calibration.sample import Sample
from ecoflap.errors import CalibrationError


def answers_by_decoder(model: nn.Module) -> bool:
    """A generating question-answering class whose configuration does not say "encoder-decoder", though it is one.

    So is BlipForQuestionAnswering: its labels are not shifted for its decoder, and start with the start token.
    """
    generates = getattr(model, "can_generate", None)
    return (
        callable(generates)
        and bool(generates())
        and "QuestionAnswering" in type(model).__name__
        and "decoder_input_ids" in parameters_of(model)
        and not is_encoder_decoder(model)
    )


def encode_answers(samples: Sequence[Sample], model: nn.Module, processor: Any, source: str) -> dict[str, Any]:
    """Question and picture for the encoder, the answer for the decoder.

    The question stands alone, as in BLIP's own training, without the words that a prompt puts around it. The answer is
    framed as the model generates it: from the start token of its configuration to the separator.

    Returns:
        ``pixel_values``; ``input_ids``, ``attention_mask`` ``[B, L]`` of the questions; ``decoder_input_ids``,
        ``decoder_attention_mask``, ``labels`` (-100 on padding) ``[B, A]`` of the answers.

    Raises:
        CalibrationError: a sample has no question, answer or picture.
    """
    tokenizer: Any = tokenizer_of(processor)
    start, end = _frame(model)
    questions, rows = [], []
    for sample in samples:
        question = sample.question if sample.question is not None else sample.prompt
        if question is None or sample.text is None or not sample.images:
            raise CalibrationError(
                f"{source}: a sample lacks a question, an answer or an image: {type(model).__name__} needs all three"
            )
        questions.append(question)
        answer = tokenizer(sample.text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        rows.append(torch.tensor([start, *answer, end]))
    encoded: dict[str, Any] = encode_pairs(samples, questions, model, processor)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    return {
        **encoded,
        "decoder_input_ids": padded,
        "decoder_attention_mask": real,
        "labels": padded.masked_fill(real == 0, IGNORED),
    }


def _frame(model: nn.Module) -> tuple[int, int]:
    """Start and end token of an answer: ``bos_token_id``, and ``sep_token_id`` or else ``eos_token_id``."""
    config = text_config(model)
    start = getattr(config, "bos_token_id", None)
    ends = (getattr(config, name, None) for name in ("sep_token_id", "eos_token_id"))
    end = next((token for token in ends if isinstance(token, int)), None)
    if not isinstance(start, int) or end is None:
        raise CalibrationError("the text configuration has no bos_token_id and no sep_token_id or eos_token_id")
    return start, end


def with_own_start(ids: torch.Tensor, model: nn.Module, tokenizer: Any) -> torch.Tensor:
    """Token ids ``[B, L]`` whose first one is the decoder's own start token.

    A decoder that reads an encoder's tokenizer (BLIP on BERT's) generates from ``bos_token_id`` of its configuration
    where the tokenizer puts its class token.
    """
    start, cls = getattr(text_config(model), "bos_token_id", None), getattr(tokenizer, "cls_token_id", None)
    if not isinstance(start, int) or cls is None or start == cls or not bool((ids[:, 0] == cls).all()):
        return ids
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1)


def with_instruction_alone(encoded: dict[str, Any], prompts: Sequence[str], processor: Any) -> dict[str, Any]:
    """The batch with the prompts alone, not the answers behind them, as what an instructed Q-Former reads.

    InstructBLIP's processor gives its Q-Former the language model's whole text, by a tokenizer of its own; a decoder's
    text ends in the answer, which the pictures' features must not know.
    """
    tokenizer = getattr(processor, "qformer_tokenizer", None)
    if tokenizer is None or "qformer_input_ids" not in encoded:
        return encoded
    read = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    return {
        **encoded,
        "qformer_input_ids": read["input_ids"],
        "qformer_attention_mask": read["attention_mask"],
    }
