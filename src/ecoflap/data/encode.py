"""Encodes samples for each kind of model: decoders, encoder-decoders, BLIP, pairs of encoders, classifiers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ecoflap.data.model_facts import IGNORED, is_encoder_decoder, max_length, parameters_of, text_config
from ecoflap.data.prompts import Prompter, image_processor_of, padding_token, tokenizer_of, using_processor
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError


def encode_targets(samples: Sequence[Sample], prompter: Prompter, start: int, seed: int) -> dict[str, Any]:
    """Batch of an encoder-decoder: prompts (or prefixes) in ``input_ids``, answers (or suffixes) in ``labels``.

    Args:
        start: number of the first sample; with ``seed`` it decides where a caption is cut.

    Returns:
        The processor's tensors, and ``labels`` ``[B, A]`` with -100 on padding.
    """
    pairs = [_prefix_suffix(sample, seed, start + i) for i, sample in enumerate(samples)]
    texts = [
        prompter.render(replace(sample, prompt=prefix)) for sample, (prefix, _) in zip(samples, pairs, strict=True)
    ]
    encoded = prompter.encode(texts, [sample.images for sample in samples])
    assert prompter.tokenizer is not None
    targets = [prompter.tokenizer(text_target=suffix, verbose=False)["input_ids"] for _, suffix in pairs]
    encoded["labels"] = pad_sequence([torch.tensor(t) for t in targets], batch_first=True, padding_value=IGNORED)
    return encoded


def _prefix_suffix(sample: Sample, seed: int, position: int) -> tuple[str, str]:
    """Prompt and answer; a caption without a prompt is cut at a word drawn by (seed, position), as in the paper."""
    text = (sample.text or "").strip()
    if sample.prompt is not None or sample.messages:
        return sample.prompt or "", text
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"{seed}/{position}").randint(1, len(words) - 1)
    return " ".join(words[:cut]), " ".join(words[cut:])


def encode_continued(samples: Sequence[Sample], prompter: Prompter) -> dict[str, Any]:
    """Batch of a decoder: prompt and answer in ``input_ids``, only the answer with its end in ``labels``.

    Returns:
        The processor's tensors, and ``labels`` ``[B, L]`` with -100 on prompt, image and padding.

    Raises:
        CalibrationError: the processor changes the answer, so that it can't be found.
    """
    images = [sample.images for sample in samples]
    if prompter.takes_suffix and any(images):
        prompts = [prompter.render(sample) for sample in samples]
        return prompter.encode_suffixes(prompts, [(sample.text or "").strip() for sample in samples], images)
    texts, tails = [], []
    for sample in samples:
        prompt, joined = prompter.render(sample), prompter.render_answered(sample)
        before, ids = prompter.token_ids(prompt), prompter.token_ids(joined)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        texts.append(joined)
        tails.append(ids[same:])
    encoded = prompter.encode(texts, images)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = torch.full_like(ids, IGNORED)
    for row, tail in enumerate(tails):
        end = int(mask[row].nonzero()[-1]) + 1
        # Images only lengthen the prompt: counted from the end, the answer has the same position as without them.
        if ids[row, end - len(tail) : end].tolist() != tail:
            raise CalibrationError(
                "the processor changes the answer's tokens, so the prompt cannot be masked in the loss"
            )
        labels[row, end - len(tail) : end] = torch.tensor(tail)
    encoded["labels"] = labels
    return encoded


@using_processor()
def encode_pairs(
    samples: Sequence[Sample], texts: Sequence[str], model: nn.Module, processor: Any
) -> dict[str, torch.Tensor]:
    """The first image of each sample with its text: ``pixel_values`` and ``input_ids``, ``[B, ...]`` each."""
    with padding_token(tokenizer_of(processor)):
        encoded = processor(
            images=[sample.image for sample in samples],
            text=list(texts),
            return_tensors="pt",
            **text_options(model, processor),
        )
    return _tensors(encoded)


@using_processor()
def encode_texts(texts: Sequence[str], model: nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    """Texts alone, as :func:`encode_pairs` encodes them."""
    with padding_token(tokenizer_of(processor)):
        return _tensors(processor(text=list(texts), return_tensors="pt", **text_options(model, processor)))


def text_options(model: nn.Module, processor: Any) -> dict[str, Any]:
    """How texts are padded and cut for ``model``.

    Most texts are padded to the longest of the batch. Some models were trained on texts padded to one length, and take
    the last token as the text's embedding (SigLIP): then the processor has an option for it, or the tokenizer makes no
    attention mask, or the model has the bias of the sigmoid loss.
    """
    tokenizer = tokenizer_of(processor)
    known = int(getattr(tokenizer, "model_max_length", 0) or 0)
    limits = [n for n in (max_length(model), known if 0 < known < 10**6 else None) if n]  # 1e30 says "no limit"
    limit = min(limits, default=None)
    own = getattr(processor, "text_kwargs", None) or {}
    if "padding" in own:  # the processor pads and cuts as in the model's training
        return {} if limit is None or own.get("max_length", limit) <= limit else {"max_length": limit}
    fixed = "attention_mask" not in getattr(tokenizer, "model_input_names", ("attention_mask",))
    fixed = fixed or isinstance(getattr(model, "logit_bias", None), torch.Tensor)
    padding: bool | str = "max_length" if fixed and limit is not None else True
    if limit is None or getattr(processor, "num_query_tokens", 0) is None:  # BLIP-2's can't cut without its queries
        return {"padding": padding}
    return {"padding": padding, "truncation": True, "max_length": limit}


def _tensors(encoded: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in dict(encoded).items() if isinstance(value, torch.Tensor)}


def answers_by_decoder(model: nn.Module) -> bool:
    """Whether it is a generating encoder-decoder whose configuration does not say so (BlipForQuestionAnswering).

    Its labels are not shifted for its decoder, and begin with the start token.
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
    """Question and image for the encoder, the answer for the decoder.

    The question is used without a prompt, as in BLIP's training. The answer has the tokens that the model generates:
    from the start token of its configuration to the separator.

    Returns:
        ``pixel_values``; ``input_ids``, ``attention_mask`` ``[B, L]`` of the questions; ``decoder_input_ids``,
        ``decoder_attention_mask``, ``labels`` (-100 on padding) ``[B, A]`` of the answers.

    Raises:
        CalibrationError: a sample has no question, answer or image.
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

    A decoder with an encoder's tokenizer (BLIP with BERT's) generates from its ``bos_token_id``, but the tokenizer
    begins with its class token.
    """
    start, cls = getattr(text_config(model), "bos_token_id", None), getattr(tokenizer, "cls_token_id", None)
    if not isinstance(start, int) or cls is None or start == cls or not bool((ids[:, 0] == cls).all()):
        return ids
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1)


def with_instruction_alone(encoded: dict[str, Any], prompts: Sequence[str], processor: Any) -> dict[str, Any]:
    """The batch with prompts without answers as input of an instructed Q-Former.

    InstructBLIP's processor gives its Q-Former the whole text of the language model. The text of a decoder ends with
    the answer, which must not influence the features of the image.
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


def class_number(label: str, classes: Mapping[str, int], source: str, whose: str = "model's") -> int:
    """The number of a class given by its name (in any case) or number.

    Args:
        classes: numbers by names in lower case; empty if names are unknown.
        whose: the owner of the numbering, for the message.

    Raises:
        CalibrationError: it is none of the classes.
    """
    key = label.strip().lower()
    if key in classes:
        return classes[key]
    if key.isdigit() and (not classes or int(key) <= max(classes.values())):
        return int(key)
    shown = label if len(label) <= 40 else f"{label[:40]}..."
    few = ", ".join(list(classes)[:5]) + (", ..." if len(classes) > 5 else "")
    raise CalibrationError(
        f"{source}: label '{shown}' is none of the {whose} {len(classes)} classes ({few or 'unnamed'}): is it the "
        "column of classes?"
    )


def numbers_by_name(names: Sequence[str]) -> dict[str, int]:
    """Numbers by names in lower case; of equal names, the first counts."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name.strip().lower(), number)
    return numbers


def label_of(sample: Sample) -> str | None:
    """The class of a sample without other text: its label, or else its text."""
    return sample.label if sample.label is not None else sample.text


def sentence_of(sample: Sample) -> str | None:
    """The text that a classifier reads of a sample whose class is its label."""
    return next((text for text in (sample.question, sample.prompt, sample.text) if text is not None), None)


@using_processor()
def encode_classified(
    samples: Sequence[Sample], model: nn.Module, processor: Any, source: str, own_classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """A batch of a classifier.

    Its inputs depend on the forward's arguments and the processor: ``pixel_values`` ``[B, ...]`` of one image, ``[B, N,
    ...]`` of N images (NLVR2), ``input_ids`` of a text, or both; ``labels`` ``[B]`` are class numbers, left out if the
    samples have no class. If the data set has as many classes as the model, but no common name ("LABEL_0"), the order
    of ``own_classes`` counts.

    Raises:
        CalibrationError: a sample lacks an image or text, or its label is none of the model's classes.
    """
    arguments = parameters_of(model)
    encoded: dict[str, Any] = {}
    reads = "input_ids" in arguments and tokenizer_of(processor) is not None
    if "pixel_values" in arguments and image_processor_of(processor) is not None:
        encoded |= _pictures(samples, model, processor, source)
    if reads:
        encoded |= _sentences(samples, model, processor, source)
    labels = [sample.label if reads else label_of(sample) for sample in samples]
    if any(label is not None for label in labels):
        names = getattr(getattr(model, "config", None), "label2id", None) or {}
        numbers = {str(name).lower(): int(number) for name, number in names.items()}
        own = numbers_by_name(own_classes or ())
        if len(own_classes or ()) == len(numbers) and not own.keys() & numbers.keys():
            numbers = own
        encoded["labels"] = torch.tensor([class_number(label or "", numbers, source) for label in labels])
    elif reads:
        raise CalibrationError(f"{source} has no class column, but {type(model).__name__} needs a class for its loss")
    return encoded


def _pictures(samples: Sequence[Sample], model: nn.Module, processor: Any, source: str) -> dict[str, Any]:
    wanted = getattr(getattr(model, "config", None), "num_images", None)
    several = isinstance(wanted, int)
    count = wanted if isinstance(wanted, int) else 1
    for sample in samples:
        if len(sample.images) < count or (several and len(sample.images) != count):
            raise CalibrationError(
                f"{type(model).__name__} needs {count} image{'s' if count > 1 else ''} with every sample, but one of "
                f"{source} has {len(sample.images)}"
            )
    pictures = [picture for sample in samples for picture in sample.images[:count]]
    image_processor: Any = image_processor_of(processor)
    encoded = dict(image_processor(images=pictures, return_tensors="pt"))
    if not several:
        return encoded
    return {
        name: value.view(-1, count, *value.shape[1:])
        for name, value in encoded.items()
        if isinstance(value, torch.Tensor)
    }


def _sentences(samples: Sequence[Sample], model: nn.Module, processor: Any, source: str) -> dict[str, Any]:
    texts = [sentence_of(sample) for sample in samples]
    if any(text is None for text in texts):
        raise CalibrationError(f"{source}: a sample has no text, but {type(model).__name__} needs one")
    tokenizer: Any = tokenizer_of(processor)
    with padding_token(tokenizer):
        return dict(tokenizer(texts, return_tensors="pt", **text_options(model, processor)))
