"""Log-likelihood of given answers to prompts with or without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ecoflap.calibration.batches import make_batches
from ecoflap.calibration.models import can_take, is_encoder_decoder, to_device
from ecoflap.calibration.padding import IGNORED
from ecoflap.calibration.sample import Sample
from ecoflap.calibration.sources import SampleSet
from ecoflap.errors import CalibrationError
from ecoflap.network.logits import logits_on_demand


class Likelihoods(NamedTuple):
    """Of each sample's answer, on the CPU.

    Attributes:
        total: log p of all its tokens and the end token, natural logarithm, fp32 ``[B]``.
        tokens: how many these are, int64 ``[B]``.
    """

    total: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def answer_likelihoods(
    model: nn.Module, processor: Any, samples: Sequence[Sample], source: str, sequence_length: int | None = None
) -> Likelihoods:
    """log p(``text`` | ``prompt``, pictures) of each sample, over the tokens that calibration labels, in one batch.

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
        if not is_encoder_decoder(model):  # a decoder's logits at a token are for the next one
            counted = torch.cat([counted[:, 1:], counted.new_zeros(len(counted), 1)], dim=1)
            labels = labels.roll(-1, dims=1)
        found = logits[counted.to(logits.device)].float()
    targets = labels[counted].to(found.device)
    chosen = torch.zeros(labels.shape)
    chosen[counted] = (found.gather(1, targets[:, None])[:, 0] - found.logsumexp(dim=1)).cpu()
    return Likelihoods(chosen.sum(dim=1), counted.sum(dim=1))
