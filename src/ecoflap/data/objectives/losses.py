"""Losses that a model computes itself: token cross-entropy, class cross-entropy, or its forward's own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ecoflap.data.model_facts import Batch, can_take, parameters_of
from ecoflap.errors import CalibrationError


def language_modelling(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own token cross-entropy from ``labels``, without a KV cache (a filled one would hide k and v)."""
    if batch.get("labels") is None:
        raise CalibrationError("the batch has no labels, so there is no language-model loss: give captions or answers")
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" not in batch and can_take(model, "use_cache") else {}
    return scalar_loss(model(**batch, **extra), "lm")


def classification(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own cross-entropy from class numbers ``labels`` ``[B]``, of one image, two (NLVR2) or a text."""
    if batch.get("labels") is None:
        raise CalibrationError("the batch has no labels, so there is no classification loss: give a class column")
    return scalar_loss(model(**batch), "classification")


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that the model's forward returns: a ``.loss``, an entry ``"loss"``, or a scalar tensor."""
    return scalar_loss(model(**batch), "model")


def model_loss_without_cache(model: nn.Module, batch: Batch) -> torch.Tensor:
    """:func:`model_loss`, with ``use_cache=False`` if the forward has that argument."""
    if "use_cache" in parameters_of(model):
        batch = {"use_cache": False, **batch}  # type: ignore[dict-item]
    return model_loss(model, batch)


def scalar_loss(output: Any, name: str) -> torch.Tensor:
    """The loss in a forward's output as an fp32 scalar; ``name`` is the objective's, for messages.

    Raises:
        CalibrationError: there is none, or it is no scalar.
    """
    loss = output
    if not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, dict):
            loss = output.get("loss")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else "no loss"
        raise CalibrationError(
            f"objective '{name}': the model returned {got}; it must return a scalar loss (give labels in the batch, or "
            "an objective module:function)"
        )
    return loss.reshape(()).float()
