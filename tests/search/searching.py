"""What the tests of the search share: pico models with their batches, random masks, copies that are really pruned."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import picos
import torch
from families.moe import mixture_of_modules
from families.vision import Eva
from torch import Tensor, nn

from ecoflap.allocation import Allocation, LayerSize, allocate
from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.data.objectives import Objective, on_device, resolve
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.prune import PruningOptions
from ecoflap.search.options import SearchJournal, SearchOptions
from ecoflap.search.order import Order
from ecoflap.search.search import Found, search_allocation
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.dense import dense_norms
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.work import Work

# Options of a short search on curves, through the command line.
JOB = ("--importance", "sensitivity", "--search-options", "rounds=2", "--search-options", "swaps=3")


class Journal:
    """States as a file would keep them; the search begins at ``kept``."""

    def __init__(self, kept: str | None = None) -> None:
        self.kept, self.saved = kept, list[str]()

    def load(self) -> dict[str, Any] | None:
        return None if self.kept is None else json.loads(self.kept)

    def save(self, state: dict[str, Any]) -> None:
        self.saved.append(json.dumps(state))


def shared_llama() -> nn.Module:
    """A LLaMA whose first and last block share two matrices."""
    model = picos.llama()
    for name in ("mlp.up_proj", "self_attn.o_proj"):
        first, last = (model.get_submodule(f"model.layers.{index}.{name}") for index in (0, 2))
        last.weight = first.weight
    return model


def _pictures() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, 5, 8, generator=generator)} for _ in range(2)]


_OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Sequence[Any]]]] = {
    "shared_llama": (shared_llama, lambda: picos.batches("llama", padding=True)),
    "experts": (mixture_of_modules, lambda: picos.batches("llama")),
    "uncalled": (Eva, _pictures),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model at work; shared by all tests, so that none may change it."""

    model: nn.Module
    anatomy: Anatomy
    batches: Sequence[Any]
    loss: Objective

    def loss_of(self, model: nn.Module, index: int = 0) -> Tensor:
        with torch.no_grad(), cache_disabled(model):
            return self.loss(model, self.batches[index])


@cache
def subject(name: str) -> Subject:
    """A family of :mod:`picos`, or one of: shared_llama, experts, uncalled."""
    torch.manual_seed(0)
    if name in _OWN:
        model, batches = (make() for make in _OWN[name])
    else:
        model, batches = picos.FAMILIES[name].build(), picos.batches(name, padding=True)
    model.eval()
    loss = on_device(resolve(None, model))
    with cache_disabled(model):
        return Subject(model, discover(model, batches[0], run=loss), batches, loss)


@cache
def order_of(it: Subject) -> Order:
    """Wanda's."""
    return Order.of(dense_norms(it.model, it.anatomy, it.batches, it.loss), needs="norm", compare=None)


def random_masks(anatomy: Anatomy, seed: int = 0, kept: float = 0.5) -> dict[Layer, Tensor]:
    """(out, in) bool for every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.rand(layer.shape, generator=generator) < kept for layer in anatomy.layers}


def really_pruned(model: nn.Module, masks: Mapping[Layer, Tensor]) -> nn.Module:
    """A copy whose weights are zero where ``masks`` (out, in) are False."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in masks.items():
            weight = pruned.get_parameter(layer.name)
            weight.mul_(mask.t() if layer.transposed else mask)
    return pruned


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every entry of the state dict as bytes."""
    return {
        name: tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def even(anatomy: Anatomy, sparsity: float = 0.5, **options: Any) -> Allocation:
    """The same sparsity everywhere."""
    return allocate(_sizes(anatomy), sparsity=sparsity, uniform=True, **options)


def uneven(anatomy: Anatomy, sparsity: float = 0.5, cap: float = 0.8, **options: Any) -> Allocation:
    """Every other block far sparser than its neighbours."""
    return allocate(_sizes(anatomy), sparsity=sparsity, max_sparsity=cap, **options)


def _sizes(anatomy: Anatomy) -> list[LayerSize]:
    numbers = {block.name: number for number, block in enumerate(anatomy.blocks)}
    return [
        LayerSize(x.name, x.tower, x.block, x.numel, 0.1 + numbers[x.block] % 2, x.modality, x.shape)
        for x in anatomy.layers
    ]


def quiet(model: nn.Module) -> ExitStack:
    """No gradients and no cache, as the search runs forwards."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(cache_disabled(model))
    return stack


def searched(
    it: Subject,
    start: Allocation,
    *,
    criterion: str = "wanda",
    shares: Mapping[str, Any],
    options: SearchOptions,
    tokens: TokenChoice = ALL,
    progress: Progress | None = None,
    journal: SearchJournal | None = None,
) -> Found:
    """``search_allocation`` for a criterion by its name."""
    work = Work(it.loss, progress=progress or Silent())
    pruning, limits = PruningOptions(criterion, tokens=tokens), AllocationOptions(**shares)
    return search_allocation(it.model, it.anatomy, start, it.batches, options, limits, pruning, work, journal)
