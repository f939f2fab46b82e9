"""Prunes one pico model by Wanda and judges the result by plain forwards, block after block."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap import api
from ecoflap.allocation import LayerSize, allocate
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy, Layer, parameter_of
from ecoflap.model.patching import cache_disabled
from ecoflap.model.slices import stored_matrix

Batches = Sequence[dict[str, Tensor]]


class WrongResult(Exception):
    """What was pruned is not what it should be."""


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss; the mean square of its logits where it has none."""
    output = model(**batch)
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss.mean()
    logits: Tensor = output.logits
    return logits.float().square().mean()


def names_each_matrix_once(model: nn.Module, anatomy: Anatomy) -> None:
    """Raises WrongResult unless each matrix of the model is prunable, or named with its reason, once.

    Of stacked experts some may be prunable and the others named.
    """
    prunable = {parameter_of(name) for layer in anatomy.layers for name in (layer.name, *layer.aliases)}
    dense = Counter(entry.name for entry in (*anatomy.unprunable, *anatomy.outside))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        parts = name.split(".")
        named = sum(dense[".".join(parts[:end])] for end in range(1, len(parts) + 1))
        if not (named == 1 if name not in prunable else named == 0 or parameter.dim() == 3):
            raise WrongResult(f"{name} is {'' if name in prunable else 'not '}prunable and named {named} times")


def prune_and_judge(model: nn.Module, batches: Batches, rows: Sequence[Tensor] | None = None) -> Anatomy:
    """Prune half of every layer, and compare zeros, masks and all other weights with what they must be.

    Of stacked experts the numbers of zeros are compared, of all other layers the masks.

    Args:
        rows: of each batch which rows (samples, rows) of an encoder's input are real; where not given, all.

    Raises:
        WrongResult: something differs.
    """
    with cache_disabled(model):
        anatomy = discover(model, batches[0], run=loss_of)
    names_each_matrix_once(model, anatomy)
    sizes = [
        LayerSize(one.name, one.tower, one.block, one.numel, 1.0, one.modality, one.shape) for one in anatomy.layers
    ]
    allocation = allocate(sizes, sparsity=0.5, uniform=True)
    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    api.prune_to(model, anatomy, allocation, batches, criterion="wanda", loss=loss_of)
    changed = {parameter_of(name) for layer in anatomy.layers for name in (layer.name, *layer.aliases)}
    for name, tensor in model.state_dict().items():
        if name not in changed and not torch.equal(tensor, before[name]):
            raise WrongResult(f"{name} was changed")
    for block in anatomy.blocks:
        squares = _squares(plain, block.layers, batches, rows)
        for layer in block.layers:
            weight, mask = stored_matrix(plain, layer.name), stored_matrix(model, layer.name) == 0
            if int(mask.sum()) < allocation[layer.name].zeros:
                raise WrongResult(f"{layer.name} has {int(mask.sum())} zeros, not {allocation[layer.name].zeros}")
            if layer.name in squares:
                _check_mask(layer, weight, mask, squares[layer.name])
            weight[mask] = 0
    return anatomy


def _check_mask(layer: Layer, weight: Tensor, mask: Tensor, squares: Tensor) -> None:
    scores, zeroed = (weight.T, mask.T) if layer.transposed else (weight, mask)
    scores = scores.double().abs() * squares.sqrt()
    highest = scores.masked_fill(~zeroed, 0).amax(dim=1)
    lowest = scores.masked_fill(zeroed, torch.inf).amin(dim=1)
    if not (highest <= lowest * (1 + 1e-4) + 1e-12).all():
        raise WrongResult(f"{layer.name} has other zeros than Wanda by plain forwards")


def _squares(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, rows: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Σx² of each column of what the modules of the layers receive in all their calls."""
    real: list[Tensor] = []  # of the batch at hand
    names = {
        id(model.get_submodule(path)): layer.name
        for layer in layers
        if not (layer.stacked or layer.uncalled or layer.expert)
        for path in layer.modules
    }
    found: dict[str, list[Tensor]] = defaultdict(list)

    def note(module: nn.Module, args: Any) -> None:
        x = args[0].detach().double()
        if real and x.shape[:2] == real[-1].shape:
            x = x[real[-1]]
        found[names[id(module)]].append(x.reshape(-1, x.shape[-1]).square().sum(dim=0))

    hooks = [one.register_forward_pre_hook(note) for one in model.modules() if id(one) in names]
    with torch.no_grad(), cache_disabled(model):
        for number, batch in enumerate(batches):
            real += rows[number : number + 1] if rows is not None else ()
            loss_of(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(parts).sum(dim=0) for name, parts in found.items()}
