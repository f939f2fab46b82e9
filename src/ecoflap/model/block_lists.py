"""Finds the lists of modules that are stacks of blocks: the outermost lists whose elements feed one another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from ecoflap.model.trace import Trace


@dataclass(frozen=True)
class BlockList:
    """A stack of blocks: its path, its elements in the order of their calls, their driver and its number of calls.

    Attributes:
        repeats: some element is called more than once in a call of the driver.
    """

    path: str
    elements: tuple[str, ...]
    driver: str
    calls: int = 1
    repeats: bool = False


def _holds_matrix(module: nn.Module) -> bool:
    """Whether it has inner modules with a weight matrix: a block, not a single layer."""
    children = list(module.children())
    return bool(children) and any(parameter.dim() >= 2 for parameter in module.parameters())


def _holds_linear(module: nn.Module) -> bool:
    """Whether it has a linear layer to prune: convolutions between stages (Florence-2) are not blocks."""
    return any(isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D" for inner in module.modules())


def block_lists(model: nn.Module, trace: Trace | None) -> list[BlockList]:
    """Stacks of blocks in ``model``, in the order of their first call (of definition without a trace).

    A ``ModuleList`` or ``Sequential`` whose elements hold matrices is a stack if, in the traced forward, the output of
    each element reaches the next one, unchanged or changed on the way. Experts and deep-stack mergers work in parallel,
    so they are no stacks. Two lists whose elements alternate (Idefics' cross-attention between its layers) make one
    stack, named by the path of the larger one. A stack whose elements are themselves stacks of blocks, or consist of
    stacks of equal blocks (the stages of a Swin), is replaced by those.
    """
    found: list[BlockList] = []
    loose: list[BlockList] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if any(path.startswith(element + ".") for stack in found for element in stack.elements):
            continue  # inside a block: T5's list of sublayers, experts
        elements = [
            f"{path}.{name}" if path else name for name, child in module.named_children() if _holds_matrix(child)
        ]
        if not elements or _is_stages(model, elements):
            continue
        if trace is None:
            found.append(BlockList(path, tuple(elements), path.rpartition(".")[0]))
            continue
        elements = sorted((element for element in elements if element in trace.calls), key=trace.position)
        if not elements:
            continue
        links = sum((a, b) in trace.chained for a, b in pairwise(elements))
        driver = trace.drivers[elements[0]]
        calls = trace.calls.get(driver, 1)
        stack = BlockList(path, tuple(elements), driver, calls, any(trace.calls[one] > calls for one in elements))
        if links >= (len(elements) - 1) / 2:
            found.append(stack)
        elif all(_holds_linear(model.get_submodule(element)) for element in elements):
            loose.append(stack)
    if trace is not None:
        found = _joined(found, loose, trace)
        found.sort(key=lambda stack: trace.position(stack.elements[0]))
    return found


def _joined(stacks: list[BlockList], loose: list[BlockList], trace: Trace) -> list[BlockList]:
    """``stacks``, each merged with the ``loose`` list whose elements run between its own, and pairs of loose lists.

    An element runs between two others if the output of one reaches it and its output reaches the other. A module that
    only reads from a stack (deep-stack mergers) does not. Nor does a module with a skip connection in the parent (the
    attentions of Emu3's image tokens): the output before it also reaches the element after it.
    """
    found = list(stacks)
    left = list(loose)
    while left:
        one = left.pop(0)
        for other in (*found, *left):
            both = _interleaved(one, other, trace)
            if both is not None:
                (found if other in found else left).remove(other)
                found.append(both)
                break
    return found


def _interleaved(one: BlockList, other: BlockList, trace: Trace) -> BlockList | None:
    if one.driver != other.driver:
        return None
    merged = tuple(sorted((*one.elements, *other.elements), key=trace.position))
    inner = set(one.elements)
    if any((a, b) not in trace.chained for a, b in pairwise(merged) if a in inner or b in inner):
        return None
    place = {path: number for number, path in enumerate(merged)}
    if any(place[b] - place[a] > 1 for a, b in trace.chained if a in place and b in place):
        return None
    larger = one if len(one.elements) > len(other.elements) else other
    return BlockList(larger.path, merged, one.driver, one.calls, one.repeats or other.repeats)


def _is_stages(model: nn.Module, elements: list[str]) -> bool:
    """Whether every element is a list of blocks, or contains a list of equal blocks with most of its parameters."""
    for element in elements:
        stage = model.get_submodule(element)
        if isinstance(stage, nn.ModuleList):
            continue  # a list of lists: its parent calls the blocks themselves
        inner = [
            child
            for child in stage.children()
            if isinstance(child, nn.ModuleList | nn.Sequential)
            and len({type(block) for block in child}) == 1
            and all(_holds_matrix(block) for block in child)
        ]
        # Exactly one list: a block may have several lists of parts beside its experts (LongCat-Flash).
        inner_size = max((sum(parameter.numel() for parameter in child.parameters()) for child in inner), default=0)
        if inner_size < 0.5 * sum(parameter.numel() for parameter in stage.parameters()):
            return False
    return True
