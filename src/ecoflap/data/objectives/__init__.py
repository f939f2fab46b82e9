"""Chooses the loss L by name or from the model, and checks that it is finite and depends on the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import nn

from ecoflap.data.encode import answers_by_decoder
from ecoflap.data.model_facts import Batch, is_dual_tower, is_encoder_decoder, parameters_of, to_device
from ecoflap.data.objectives.losses import model_loss_without_cache, scalar_loss
from ecoflap.data.objectives.matching import matching_argument
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss
from ecoflap.model.offload import home_of
from ecoflap.support.registry import Registry

Objective = Callable[[nn.Module, Batch], torch.Tensor]

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "lm": "ecoflap.data.objectives.losses:language_modelling",
        "seq2seq": "ecoflap.data.objectives.losses:language_modelling",
        "contrastive": "ecoflap.data.objectives.matching:contrastive",
        "zero-shot": "ecoflap.data.objectives.zero_shot:zero_shot",
        "itm-itc": "ecoflap.data.objectives.matching:itm_itc",
        "classification": "ecoflap.data.objectives.losses:classification",
        "supervised-contrastive": "ecoflap.data.objectives.supervised_contrastive:supervised_contrastive",
        "model": "ecoflap.data.objectives.losses:model_loss",
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
    if matching_argument(model) is not None:
        return "itm-itc"
    if "Classification" in type(model).__name__:
        return "classification"
    if is_encoder_decoder(model) or answers_by_decoder(model):
        return "seq2seq"
    if callable(getattr(model, "can_generate", None)) and model.can_generate():  # type: ignore[operator]
        return "lm"
    from transformers import PreTrainedModel  # its import takes seconds, see ecoflap.run.checks

    if isinstance(model, PreTrainedModel) and "labels" not in parameters_of(model):
        return "supervised-contrastive"  # a backbone: its forward has no loss of its own
    return "model"


def resolve(name: str | None, model: nn.Module) -> Objective:
    """The objective ``name`` (one of ``OBJECTIVES``, or ``module:function``); None: the model's default.

    The function takes (model, batch on the model's device) and returns a scalar in fp32.

    Raises:
        UnknownName: not registered.
        InvalidOption: the user's module or function does not exist.
    """
    name = objective_name(name, model)
    return _users(name) if ":" in name else OBJECTIVES.get(name)


def check_own(name: str) -> None:
    """Raises InvalidOption if the user's objective ``module:function`` can't be imported; no model is needed."""
    _users(name)


def _users(name: str) -> Objective:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module_name), attribute)
    except Exception as error:  # of the user's module
        raise InvalidOption(
            f"objective '{name}' cannot be imported ({type(error).__name__}: {error}): give importable.module:function"
        ) from error
    if not callable(function):
        raise InvalidOption(f"objective '{name}' is not a function")

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        return scalar_loss(function(model, batch), name)

    return objective


def default_objective(model: nn.Module) -> Objective:
    """:func:`model_loss` without a KV cache, for any module whose forward returns a loss."""
    return model_loss_without_cache


def on_device(objective: Objective) -> Objective:
    """The same objective for batches on the CPU, with the same loss to the bit in every call.

    The batch is first moved to the model's device and dtype. During the forward the global random generators have a
    fixed seed, since some models draw random numbers even in eval mode (ViLT for its patches).
    """

    def fixed(model: nn.Module, batch: Batch) -> torch.Tensor:
        placed = to_device(batch, model)
        with _randomness_fixed(model):
            return objective(model, placed)

    return fixed


@contextmanager
def _randomness_fixed(model: nn.Module) -> Iterator[None]:
    """Context with a fixed seed for the generators of the CPU and the model's GPUs; their state is restored at exit."""
    # Without CUDA, skip the search for GPUs among all parameters.
    on_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [home_of(model), *(parameter.device for parameter in model.parameters())] if on_gpus else []
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@torch.no_grad()
def check_loss(model: nn.Module, batch: Batch, objective: Objective, index: int = 0) -> float:
    """The loss of batch number ``index`` (for the message).

    Raises:
        NonFiniteLoss: it is NaN or infinite.
    """
    loss = float(on_device(objective)(model, batch))
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss of calibration batch {index} is {loss}: check the samples of that batch, or compute in float32",
            index,
        )
    return loss


@torch.no_grad()
def check_image_matters(model: nn.Module, batch: Batch, objective: Objective) -> None:
    """Check that the loss depends on the image; does nothing for a batch without ``pixel_values``.

    Most vision-language models ignore the image, without an error, if the text has no image placeholder tokens.

    Raises:
        CalibrationError: other images give the same loss to the bit.
    """
    names = [n for n, v in batch.items() if n.startswith("pixel_values") and isinstance(v, torch.Tensor)]
    if not names:
        return
    fixed = on_device(objective)
    loss = fixed(model, batch)
    for factor in (-1.0, 0.5):  # zeros stay zeros: some models drop an all-zero image as padding
        other = {n: v * factor if n in names else v for n, v in batch.items()}
        if not torch.equal(fixed(model, other), loss):
            return
    raise CalibrationError(
        "the loss does not depend on the image: the text probably lacks the image placeholder tokens; check the "
        "processor (num_query_tokens, image_token, chat template) and the prompt"
    )
