"""Finds the mixtures of experts inside a block: several modules or matrices, of which a router picks some per token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ecoflap.model.slices import Stack
from ecoflap.model.trace import Trace


@dataclass(frozen=True)
class ExpertGroup:
    """One mixture.

    Attributes:
        path: of the list of experts, or of the module that holds them as one stacked parameter.
        elements: paths of the experts; empty if they are stacked.
        size: number of experts, including identity experts.
    """

    path: str
    elements: tuple[str, ...]
    size: int

    @property
    def home(self) -> str:
        """Path of the module that holds experts and router."""
        return self.path.rpartition(".")[0]


def expert_groups(model: nn.Module, blocks: Iterable[str], trace: Trace | None = None) -> list[ExpertGroup]:
    """The mixtures inside ``blocks``.

    A ``ModuleList`` or ``ModuleDict`` of two or more modules of one class with matrices is a mixture, unless the traced
    forward passed a tensor from one element to the next (that is a chain). A module with "expert" in its name or class
    and stacked parameters is one, too.
    """
    found: list[ExpertGroup] = []
    for block in blocks:
        inside: list[ExpertGroup] = []
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if any(path.startswith(group.path + ".") for group in inside):
                continue
            inside += _listed(path, module, trace) or _stacked(path, module) or _flat(path, module, trace)
        found += inside
    return found


def _listed(path: str, module: nn.Module, trace: Trace | None) -> list[ExpertGroup]:
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return []
    children = {name: child for name, child in module.named_children() if any(p.dim() >= 2 for p in child.parameters())}
    if len(children) < 2 or len({type(child) for child in children.values()}) > 1:
        return []
    elements = tuple(f"{path}.{name}" for name in children)
    if trace is not None:
        called = sorted((element for element in elements if element in trace.calls), key=trace.position)
        if any(pair in trace.chained for pair in pairwise(called)):
            return []
    return [ExpertGroup(path, elements, len(elements))]


def _stacked(path: str, module: nn.Module) -> list[ExpertGroup]:
    sizes = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    named = "expert" in path.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()
    return [ExpertGroup(path, (), max(sizes))] if named and sizes else []


def _flat(path: str, module: nn.Module, trace: Trace | None) -> list[ExpertGroup]:
    """A mixture whose matrices are concatenated in a 2-dimensional parameter, as the traced forward showed (DBRX)."""
    stacks = {} if trace is None else trace.stacked
    counts = {stack.count for leaf in module._parameters if (stack := stacks.get(f"{path}.{leaf}")) and stack.flat}
    if len(counts) != 1:
        return []
    parent = path.rpartition(".")[0]
    return [ExpertGroup(parent if "expert" in parent.rpartition(".")[2].lower() else path, (), counts.pop())]


def slices_in_use(module: nn.Module, count: int, reached: int) -> int:
    """How many of a stack's ``count`` slices belong to an expert: the least number that a stack of the module has.

    If a mixture has identity experts, one stack may have slices for them that are never multiplied by (LongCat-Flash).

    Args:
        reached: number of slices up to the last that the traced forward multiplied by: those are in use.
    """
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return max(reached, min([count, *map(len, stacks)]))


def mixture_of(model: nn.Module, path: str) -> str:
    """Path of the mixture that the stacked slices of the module at ``path`` belong to.

    This is the module itself; or its parent, if that has several children of the same class with one stack each, all of
    the same length (JetMoE): then the slices with the same index form one expert.
    """
    parent = path.rpartition(".")[0]
    module = model.get_submodule(path)
    like = [one for one in model.get_submodule(parent).children() if type(one) is type(module)]
    lengths = [[len(p) for p in one.parameters() if p.dim() == 3] for one in like]
    return parent if len(like) > 1 and len(lengths[0]) == 1 and lengths.count(lengths[0]) == len(lengths) else path


def router_of(model: nn.Module, mixture: str, count: int) -> str | None:
    """Path of the linear layer with one output for each of ``count`` experts; None unless there is exactly one."""
    for home in (mixture, mixture.rpartition(".")[0]):
        found = [
            path
            for path, module in model.get_submodule(home).named_modules(prefix=home)
            if isinstance(module, nn.Linear) and module.out_features == count
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def lies_transposed(module: nn.Module) -> bool | None:
    """Whether the matrices that a module stacks are stored as (inputs, outputs); None if that is unknown.

    A module of transformers' interface for experts has an attribute for it. Otherwise the shapes of two stacks show it,
    if one holds gate and up and the other is the down projection: (2 · inner, width) and (width, inner), or both
    transposed.
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    sizes = [tuple(parameter.shape[1:]) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if len(sizes) != 2:
        return None
    for one, other in (sizes, sizes[::-1]):
        if one == (2 * other[1], other[0]):
            return False
        if one == (other[1], 2 * other[0]):
            return True
    return None


def flat_stacks(module: nn.Module) -> dict[str, tuple[int, bool]]:
    """2-dimensional parameters of concatenated matrices: number of matrices, and whether each is transposed.

    DBRX's all have the same shape. Only its code shows which is transposed: x W1ᵀ and x V1ᵀ, but h W2.
    """
    if type(module).__name__ != "DbrxExpertGLU":
        return {}
    count: Any = module.moe_num_experts
    return {leaf: (int(count), leaf == "w2") for leaf in ("w1", "v1", "w2") if leaf in module._parameters}


def stack_of(model: nn.Module, name: str, module: nn.Module, trace: Trace | None) -> Stack | None:
    """The layout of the matrices that parameter ``name`` of ``module`` stacks; None if it stacks none.

    The traced forward shows it, for this module or for another of the same class; otherwise the module's attributes and
    shapes do.
    """
    stacks = {} if trace is None else trace.stacked
    if name in stacks:
        return stacks[name]
    leaf, parameter = name.rpartition(".")[2], module._parameters[name.rpartition(".")[2]]
    for other, stack in stacks.items():
        path, _, other_leaf = other.rpartition(".")
        like = model.get_submodule(path)
        if other_leaf == leaf and type(like) is type(module) and like._parameters[leaf].shape == parameter.shape:  # type: ignore[union-attr]
            return stack
    if parameter is None or parameter.dim() != 3 or "expert" not in type(module).__name__.lower():
        return None
    turned = lies_transposed(module)
    return None if turned is None else Stack(turned, len(parameter))


class Experts:
    """The mixtures of a model, for the discovery of layers."""

    def __init__(self, groups: Iterable[ExpertGroup], trace: Trace | None) -> None:
        self._groups = tuple(groups)
        self._trace = trace

    def of(self, module: str) -> str:
        """Path of the expert that contains the module at this path; "" if none does."""
        return next((element for element in self._elements() if _within(module, element)), "")

    def running(self, module: str) -> bool:
        """Whether the module belongs to a mixture with an expert that the traced forward reached."""
        if self._trace is None:
            return False
        calls = self._trace.calls
        return any(
            any(_within(module, element) for element in group.elements)
            and any(element in calls for element in group.elements)
            for group in self._groups
        )

    def routed_by(self, module: str, outputs: int) -> bool:
        """Whether a linear layer is the router of a mixture: beside its experts, with one output for each."""
        return any(
            outputs == group.size and _within(module, group.home) and not _within(module, group.path)
            for group in self._groups
        )

    def _elements(self) -> Iterator[str]:
        return (element for group in self._groups for element in group.elements)


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")
