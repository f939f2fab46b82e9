"""Log-likelihood of given continuations or answers, with or without images, for decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ecoflap.data.batches import make_batches
from ecoflap.data.model_facts import IGNORED, can_take, is_encoder_decoder, max_length, parameters_of, to_device
from ecoflap.data.prompts import tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleSet
from ecoflap.errors import CalibrationError, NonFiniteLoss
from ecoflap.model.lazy_logits import logits_on_demand


@dataclass(frozen=True)
class Request:
    """A continuation to score: tokens of the context and of the continuation, both without padding."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


class Scorer:
    """Scores continuations with one model and its tokenizer.

    A decoder reads context and continuation as one sequence; an encoder-decoder reads the context in its encoder and
    the continuation in its decoder. Special tokens are the tokenizer's own, once around the context.

    Args:
        limit: most tokens of a sequence; None for the number of positions that the model has.
    """

    def __init__(self, model: nn.Module, processor: Any, limit: int | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer_of(processor)
        self._seq2seq = is_encoder_decoder(model)
        self.limit = limit or max_length(model)

    def encode(self, context: str, continuation: str) -> Request:
        """Tokens of both texts, split where they differ from the context's own tokens.

        For a decoder the joined text is tokenised, so that a word at the border has its usual tokens. Spaces at the end
        of the context belong to the continuation, because most tokenizers join a space with the word after it.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if self._seq2seq:
            return Request(tuple(self._ids(kept)), tuple(self._ids(continuation, special=False)))
        before, whole = self._ids(kept), self._ids(kept + continuation)
        end = getattr(self._tokenizer, "eos_token_id", None)
        if (
            len(before) > 1 and before[-1] == end
        ):  # the tokenizer adds an end token, which the continuation must not have
            before = before[:-1]
            whole = whole[:-1] if whole[-1] == end else whole
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        same = min(max(same, 1), len(whole) - 1)  # the first token can't be predicted
        return Request(tuple(whole[:same]), tuple(whole[same:]))

    def fits(self, request: Request) -> bool:
        """Whether the request fits into the limit."""
        longest = max(len(request.context), len(request.continuation)) if self._seq2seq else len(request) - 1
        return self.limit is None or longest <= self.limit

    def _ids(self, text: str, special: bool = True) -> list[int]:
        assert self._tokenizer is not None
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    @torch.no_grad()
    def score(self, requests: Sequence[Request], batch_size: int) -> list[float]:
        """Σ log p(token | all before it) of each continuation, natural logarithm, in fp32 from the model's logits.

        Continuations that differ only in their last token (the letters of a question) share one row of a batch.

        Args:
            batch_size: rows of a forward.

        Raises:
            NonFiniteLoss: a logit is NaN.
        """
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            rows.setdefault((request.context, request.continuation[:-1]), []).append(number)
        ordered = sorted(rows, key=lambda row: -len(row[0]) - len(row[1]))  # rows of similar length need little padding
        scores = [0.0] * len(requests)
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            for row, logs in zip(part, self._log_probabilities(part), strict=True):
                for number in rows[row]:
                    tokens = torch.tensor(requests[number].continuation, device=logs.device)
                    scores[number] = float(logs.gather(1, tokens[:, None]).sum())
                    if scores[number] != scores[number]:
                        raise NonFiniteLoss(
                            "the log-likelihood of a continuation is NaN: the model is broken, or needs float32"
                        )
        return scores

    def _log_probabilities(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[torch.Tensor]:
        """For each row the log-probabilities ``[len(continuation), vocabulary]`` of its next tokens."""
        extra: dict[str, Any] = {"use_cache": False} if can_take(self._model, "use_cache") else {}
        if self._seq2seq:
            inputs = _padded([context for context, _ in rows])
            begin = _decoder_start(self._model)
            extra["decoder_input_ids"] = _padded([(begin, *continuation) for _, continuation in rows])["input_ids"]
            spans = [(0, len(continuation) + 1) for _, continuation in rows]
        else:
            inputs = _padded([context + continuation for context, continuation in rows])
            spans = [(len(context) - 1, len(context) + len(continuation)) for context, continuation in rows]
        first = 0
        if not self._seq2seq and "logits_to_keep" in parameters_of(self._model):
            first = min(start for start, _ in spans)  # to save the memory of a long prompt's logits
            extra["logits_to_keep"] = inputs["input_ids"].shape[1] - first
        logits = self._model(**to_device({**inputs, **extra}, self._model)).logits
        return [
            torch.log_softmax(row[start - first : end - first].float(), dim=-1)
            for row, (start, end) in zip(logits, spans, strict=True)
        ]


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, which changes neither positions nor, in a causal model, earlier tokens."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _decoder_start(model: nn.Module) -> int:
    """The token that an encoder-decoder's decoder begins with."""
    config: Any = model.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0


class Likelihoods(NamedTuple):
    """Log-likelihoods of the samples' answers, on the CPU.

    Attributes:
        total: log p of all tokens and the end token, natural logarithm, fp32 ``[B]``.
        tokens: number of these, int64 ``[B]``.
    """

    total: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def answer_likelihoods(
    model: nn.Module, processor: Any, samples: Sequence[Sample], source: str, sequence_length: int | None = None
) -> Likelihoods:
    """log p(``text`` | ``prompt``, images) of each sample, over the tokens with labels in calibration, in one batch.

    Raises:
        CalibrationError: the model can't take the samples, or gives no logits for their tokens.
    """
    drawn = SampleSet(tuple(samples), tuple(range(len(samples))), 0, source, {})
    objective = "seq2seq" if is_encoder_decoder(model) else "lm"
    (batch,) = make_batches(
        drawn,
        model,
        processor,
        batch_size=len(samples),
        sequence_length=sequence_length,
        objective=objective,
    )
    labels = batch["labels"]
    extra: dict[str, Any] = {"use_cache": False} if can_take(model, "use_cache") else {}
    with logits_on_demand(model):
        logits = getattr(model(**to_device(batch, model), **extra), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape[:2] != labels.shape:
            raise CalibrationError(f"{type(model).__name__} gives no logits for the tokens of an answer")
        counted = labels != IGNORED
        if not is_encoder_decoder(model):  # a decoder's logits at a token predict the next one
            counted = torch.cat([counted[:, 1:], counted.new_zeros(len(counted), 1)], dim=1)
            labels = labels.roll(-1, dims=1)
        found = logits[counted.to(logits.device)].float()
    targets = labels[counted].to(found.device)
    chosen = torch.zeros(labels.shape)
    chosen[counted] = (found.gather(1, targets[:, None])[:, 0] - found.logsumexp(dim=1)).cpu()
    return Likelihoods(chosen.sum(dim=1), counted.sum(dim=1))
