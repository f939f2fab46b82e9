"""The gradient of the calibration loss with respect to each prunable matrix, its mean over the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.analysis.parts import NotApplicable
from ecoflap.importance.probe import Objective, ProbeContext
from ecoflap.network.parts import Anatomy
from ecoflap.network.perturb import gradients_set_aside
from ecoflap.network.recompute import recomputing
from ecoflap.progress import Task


def mean_gradients(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], objective: Objective, task: Task
) -> dict[str, Tensor]:
    """∇L of the mean loss over ``batches`` by parameter name, in the shape of the parameter; zeros where L has none.

    One backward a batch, in which each block is computed again instead of keeping its activations. Memory: one number
    a prunable weight, and one block's activations. The model and its own gradients are as before afterwards.

    Raises:
        NonFiniteLoss: names the batch.
        NotApplicable: the model can't be differentiated.
    """
    context = ProbeContext(model, anatomy, batches, objective, seed=0)
    weights = {layer.name: model.get_parameter(layer.name) for layer in anatomy.layers}
    with torch.enable_grad(), gradients_set_aside(model), recomputing(model, context.blocks):
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for index in range(len(batches)):
            loss = context.loss_tensor(index)
            if not loss.requires_grad:
                raise NotApplicable(f"the loss of {type(model).__name__} has no gradient")
            try:
                loss.backward()  # type: ignore[no-untyped-call]
            except NotImplementedError as error:
                raise NotApplicable(f"{type(model).__name__} has no gradient: {str(error).splitlines()[0]}") from error
            task.advance(1, f"gradient of batch {index}")
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad / len(batches)
            for name, weight in weights.items()
        }
