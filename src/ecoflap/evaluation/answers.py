"""Log-likelihood of given answers to prompts with or without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ecoflap.calibration.batches import make_batches
from ecoflap.calibration.models import can_take, is_encoder_decoder, to_device
from ecoflap.calibration.padding import IGNORED
from ecoflap.calibration.sample import Sample
from ecoflap.calibration.sources import SampleSet
from ecoflap.errors import CalibrationError


@torch.no_grad()
def answer_likelihoods(
    model: nn.Module, processor: Any, samples: Sequence[Sample], source: str, sequence_length: int | None = None
) -> torch.Tensor:
    """log p(``text`` | ``prompt``, pictures) of each sample, ``[B]`` in fp32 on the CPU, in one batch.

    The sum over the answer's tokens and the end token, as calibration labels them.

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
    logits = getattr(model(**to_device(batch, model), **extra), "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != labels.shape:
        raise CalibrationError(f"{type(model).__name__} gives no logits for the tokens of an answer")
    if not is_encoder_decoder(model):  # a decoder's logits at a token are for the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    targets = labels.clamp(min=0).to(logits.device)
    chosen = logits.gather(2, targets[..., None])[..., 0].float() - logits.float().logsumexp(dim=2)
    return (chosen.cpu() * (labels != IGNORED)).sum(dim=1)
