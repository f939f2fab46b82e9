"""All families with what every test of the matrix needs of them: built once, found once, copied where it is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from families import blip, dual, moe, text, vision, vlm
from families.family import Batches, Family
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecoflap.allocation import Allocation, LayerSize, allocate
from ecoflap.data.objectives import Objective, on_device, resolve
from ecoflap.model.anatomy import discover
from ecoflap.model.carried import packed
from ecoflap.model.parts import Anatomy, Layer, parameter_of
from ecoflap.model.patching import cache_disabled
from ecoflap.model.slices import matrix_in

FAMILIES: dict[str, Family] = {
    family.name: family for kind in (text, vision, moe, vlm, dual, blip) for family in kind.FAMILIES
}


@dataclass(frozen=True)
class Case:
    """A family at work. ``model`` is shared by all tests: :meth:`fresh` gives a copy to change."""

    family: Family
    model: nn.Module
    loss: Objective
    batches: Batches
    padded: Batches
    anatomy: Anatomy

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)


@cache
def case(name: str) -> Case:
    """Two batches of two samples, without and with padding, and the anatomy that a forward shows."""
    family = FAMILIES[name]
    model = family.build(seed=0).eval()
    loss = on_device(resolve(family.objective, model))
    batches, padded = (family.batches(n=4, batch_size=2, padding=padding) for padding in (False, True))
    with cache_disabled(model):
        return Case(family, model, loss, batches, padded, discover(model, batches[0], run=loss))


def allocation_of(anatomy: Anatomy, sparsity: float = 0.5, uniform: bool = False, **options: Any) -> Allocation:
    """Every other block far sparser than its neighbours; or all alike."""
    numbers = {block.name: number for number, block in enumerate(anatomy.blocks)}
    sizes = [
        LayerSize(
            one.name, one.tower, one.block, one.numel, 0.1 + numbers[one.block] % 2, one.modality, one.shape
        )
        for one in anatomy.layers
    ]  # fmt: skip
    limits = {} if uniform else {"max_sparsity": 0.8}
    return allocate(sizes, sparsity=sparsity, uniform=uniform, **limits, **options)


def some_layers(anatomy: Anatomy) -> list[Layer]:
    """One matrix of the first and another of the last block of every tower: enough to see a wrong score."""
    chosen = {}
    for tower in anatomy.towers:
        for block, position in ((tower.blocks[0], 0), (tower.blocks[-1], -1)):
            if block.layers:
                layer = block.layers[position]
                chosen[layer.name] = layer
    return list(chosen.values())


def gradients_of(loss: Tensor, model: nn.Module, names: list[str]) -> list[Tensor | None]:
    """∇L of matrices as they are stored, by autograd; of a slice, that part of its parameter's."""
    parameters = [model.get_parameter(parameter_of(name)) for name in names]
    found = torch.autograd.grad(loss, list(dict.fromkeys(parameters)), allow_unused=True)
    of = dict(zip(map(id, dict.fromkeys(parameters)), found, strict=True))
    whole = [of[id(parameter)] for parameter in parameters]
    return [None if one is None else matrix_in(one, name) for one, name in zip(whole, names, strict=True)]


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every entry of the state dict as bytes."""
    return {
        n: t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for n, t in model.state_dict().items()
    }


def differences(one: Any, other: Any) -> str | None:
    """Where two trees of arguments or outputs differ: structure, keys, or one bit of a tensor; None if nowhere."""
    ours, spec = pytree.tree_flatten_with_path(one)
    theirs, other_spec = pytree.tree_flatten_with_path(other)
    if spec != other_spec:
        return f"structure: {spec} against {other_spec}"
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        if not same:
            return f"at {pytree.keystr(path)}: {_short(a)} against {_short(b)}"
    return None


def _short(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def calls_of(model: nn.Module, block: str, run: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """(arguments, keyword arguments) of each call of ``block`` while ``run`` runs, as they are when it begins."""
    found: list[tuple[Any, Any]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(packed(args, kwargs))

    handle = model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found
