"""The gradient of the calibration loss with respect to each prunable matrix, its mean over the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.importance.gradients import visit_gradients
from ecoflap.importance.probe import Objective, ProbeContext
from ecoflap.network.parts import Anatomy
from ecoflap.progress import Task


def mean_gradients(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], objective: Objective, task: Task
) -> dict[str, Tensor]:
    """∇L of the mean loss over ``batches`` by parameter name, in the shape of the parameter; zeros where L has none.

    One backward a batch. Memory: one number a prunable weight, and one block's activations. The model and its own
    gradients are as before afterwards.

    Raises:
        NonFiniteLoss: names the batch.
        InvalidOption: the model can't be differentiated.
    """
    context = ProbeContext(model, anatomy, batches, objective, seed=0)
    means = {layer.name: torch.zeros_like(model.get_parameter(layer.name).detach()) for layer in anatomy.layers}

    def add(name: str, weight: Tensor, gradient: Tensor) -> None:
        means[name].add_(gradient, alpha=1 / len(batches))

    for index in range(len(batches)):
        visit_gradients(context, index, add, instead="leave out --what distributions")
        task.advance(1, f"gradient of batch {index}")
    return means
