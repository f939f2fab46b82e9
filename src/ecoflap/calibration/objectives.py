"""What the loss L is: language modelling, prefix to suffix, contrastive, classification, or the user's own function."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from ecoflap.calibration.models import Batch, can_take, is_dual_tower, is_encoder_decoder, parameters_of, to_device
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.registry import Registry

Objective = Callable[[nn.Module, Batch], torch.Tensor]

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "lm": "ecoflap.calibration.objectives:language_modelling",
        "seq2seq": "ecoflap.calibration.objectives:language_modelling",
        "contrastive": "ecoflap.calibration.objectives:contrastive",
        "classification": "ecoflap.calibration.objectives:model_loss",
        "model": "ecoflap.calibration.objectives:model_loss",
    },
)


def objective_name(name: str | None, model: nn.Module) -> str:
    """The name that :func:`resolve` uses: ``name``, or the one that fits the model's class and config.

    Raises:
        UnknownName: ``name`` is neither registered nor ``module:function``.
    """
    if name is not None:
        return name if ":" in name else OBJECTIVES.check(name)
    if is_dual_tower(model):
        return "contrastive"
    if "Classification" in type(model).__name__:
        return "classification"
    if is_encoder_decoder(model):
        return "seq2seq"
    if callable(getattr(model, "can_generate", None)) and model.can_generate():  # type: ignore[operator]
        return "lm"
    return "model"


def resolve(name: str | None, model: nn.Module) -> Objective:
    """The objective called ``name`` (``lm``, ``seq2seq``, ``contrastive``, ``classification``, ``model``,
    ``module:function``), or the one that fits the model when ``name`` is None.

    The function takes (model, batch on the model's device) and returns a scalar in fp32.

    Raises:
        UnknownName: not registered.
        InvalidOption: the user's module or function does not exist.
    """
    name = objective_name(name, model)
    return _users(name) if ":" in name else OBJECTIVES.get(name)


def _users(name: str) -> Objective:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module does when it is imported
        raise InvalidOption(
            f"objective '{name}' cannot be imported ({type(error).__name__}: {error}): give importable.module:function"
        ) from error
    if not callable(function):
        raise InvalidOption(f"objective '{name}' is not a function")

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        return _scalar(function(model, batch), name)

    return objective


def language_modelling(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's own token cross-entropy from ``labels``, without a KV cache (a filled one would hide k and v)."""
    if batch.get("labels") is None:
        raise CalibrationError("the batch has no labels, so there is no language-model loss: give captions or answers")
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" not in batch and can_take(model, "use_cache") else {}
    return _scalar(model(**batch, **extra), "lm")


def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Symmetric contrastive loss over the pairs of the batch, with the model's own temperature."""
    return _scalar(model(**{**batch, "return_loss": True}), "contrastive")


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that the model's forward returns: a ``.loss``, an entry ``"loss"``, or a scalar tensor."""
    return _scalar(model(**batch), "model")


def default_objective(model: nn.Module) -> Objective:
    """:func:`model_loss`, without a KV cache where the model has one: for any module whose forward returns a loss."""
    if "use_cache" in parameters_of(model):
        return lambda module, batch: _scalar(module(**{"use_cache": False, **batch}), "model")
    return model_loss


def on_device(objective: Objective) -> Objective:
    """The same objective for batches that lie on the CPU: each is moved to the model's device and dtype first."""
    return lambda model, batch: objective(model, to_device(batch, model))


def _scalar(output: Any, name: str) -> torch.Tensor:
    """The loss in a forward's output, as a scalar in fp32 on its own device."""
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


@torch.no_grad()
def check_loss(model: nn.Module, batch: Batch, objective: Objective, index: int = 0) -> float:
    """The loss of batch number ``index`` (for the message).

    Raises:
        NonFiniteLoss: it is NaN or infinite.
    """
    loss = float(objective(model, to_device(batch, model)))
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss of calibration batch {index} is {loss}: check the samples of that batch, or compute in float32"
        )
    return loss


@torch.no_grad()
def check_image_matters(model: nn.Module, batch: Batch, objective: Objective) -> None:
    """Make sure that the loss reacts to the image; nothing to do for a batch without ``pixel_values``.

    A text without image placeholder tokens runs through most vision-language models silently, with the image ignored.

    Raises:
        CalibrationError: other pictures give the same loss to the bit.
    """
    names = [n for n, v in batch.items() if n.startswith("pixel_values") and isinstance(v, torch.Tensor)]
    if not names:
        return
    placed = to_device(batch, model)
    loss = objective(model, placed)
    for change in (torch.zeros_like, torch.neg):
        other = {n: change(cast(torch.Tensor, v)) if n in names else v for n, v in placed.items()}
        if not torch.equal(objective(model, other), loss):
            return
    raise CalibrationError(
        "the loss does not react to the image: the text probably lacks the image placeholder tokens; check the "
        "processor (num_query_tokens, image_token, chat template) and the prompt"
    )
