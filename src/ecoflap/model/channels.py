"""Finds channels that can be removed from a network as a unit: feed-forward channels, and channels inside heads.

Groups are found in one traced forward, not by names. Each linear layer's output is cut from the graph, so that a walk
back from another layer's input ends at the layers that feed it directly. A layer that is fed only by layers of its
block, and not by the residual stream, consumes the channels that those produce: the last layer of a feed-forward
network, or the output projection of an attention. Gradients then show which row belongs to which column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ecoflap.errors import AnatomyError
from ecoflap.model.parts import Anatomy, Block, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.trace import Run, plain_forward

Kind = Literal["attention", "feed-forward"]
_BOUNDARY = ""  # the label of a block's input
_Labels = dict[int, tuple[str, Tensor]]  # by id of a leaf: its label, and the leaf, so that the id is not reused


@dataclass(frozen=True)
class Member:
    """One matrix of a group.

    Attributes:
        layer: the matrix.
        outputs: whether its outputs are channels of the group; otherwise its inputs are.
        units: the unit of each of these channels.
    """

    layer: Layer
    outputs: bool
    units: Tensor

    @property
    def axis(self) -> int:
        """The axis of the channels in the stored weight."""
        return int(self.outputs == self.layer.transposed)

    @property
    def bias(self) -> str:
        """The name of the bias of its outputs, whether the layer has one or not."""
        return f"{self.layer.module}.bias"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed unit by unit from several matrices.

    A unit of a feed-forward network is one channel; of an attention, one channel of every head in q, k, v and the
    output projection (Shi et al. 2023, arXiv 2301.13741), so that all heads keep one width.

    Attributes:
        name: path of the module that consumes the channels.
        block, tower, modality: where it is.
        width: the number of units.
        members: the producers in the order of the forward, then the consumer.
    """

    name: str
    kind: Kind
    block: str
    tower: str
    modality: str
    width: int
    members: tuple[Member, ...]

    @property
    def cost(self) -> int:
        """Number of weights in one unit."""
        return sum(member.layer.numel for member in self.members) // self.width


@dataclass
class _Call:
    """One call of a linear layer: its input in the graph, and its output as a leaf."""

    layer: Layer
    given: Tensor
    leaf: Tensor


def channel_groups(
    model: nn.Module, anatomy: Anatomy, batch: Any, run: Run = plain_forward
) -> tuple[ChannelGroup, ...]:
    """The groups of channels of all towers, in the order of the forward.

    A matrix is in no group if it is shared or excluded, or if its channels mix with others (a norm between two layers).

    Args:
        batch: at least one sample of several tokens, for one forward and some partial backward passes.
        run: runs one batch (for example a loss function).

    Raises:
        AnatomyError: there is no such group.
    """
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), cache_disabled(model):
            found = [group for block in _traced(model, anatomy, batch, run) for group in block]
    finally:
        model.train(training)
    if not found:
        raise AnatomyError(
            f"{type(model).__name__} has no channels to remove: no layer of its blocks is fed by other layers of its "
            "block alone, as in a feed-forward network or an attention of nn.Linear layers"
        )
    return tuple(found)


def _traced(model: nn.Module, anatomy: Anatomy, batch: Any, run: Run) -> list[list[ChannelGroup]]:
    calls: dict[str, list[_Call]] = {block.name: [] for block in anatomy.blocks}
    labels: _Labels = {}

    def cut(tensor: Tensor, label: str) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        labels[id(leaf)] = (label, leaf)
        return leaf

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Cut the block's input from the graph: its first tensor of (batch, tokens, width), or (tokens, width)."""
        named, given = dict(kwargs), list(args)
        for place, value in (*enumerate(given), *named.items()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (2, 3):
                target: Any = given if isinstance(place, int) else named
                target[place] = cut(value, _BOUNDARY)
                break
        return tuple(given), named

    def leave(layer: Layer) -> Any:
        def hook(_module: nn.Module, args: Any, output: Any) -> Any:
            if not (args and isinstance(output, Tensor)):
                return None
            leaf = cut(output, layer.module)
            calls[layer.block].append(_Call(layer, args[0], leaf))
            return leaf

        return hook

    with ExitStack() as stack:
        for block in anatomy.blocks:
            handle = model.get_submodule(block.name).register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(handle.remove)
            for layer in block.layers:
                if not (layer.stacked or layer.uncalled or layer.expert):
                    hook = model.get_submodule(layer.module).register_forward_hook(leave(layer))
                    stack.callback(hook.remove)
        run(model, batch)
    return [_of_block(block, calls[block.name], labels) for block in anatomy.blocks]


def _of_block(block: Block, calls: Sequence[_Call], labels: _Labels) -> list[ChannelGroup]:
    """Its groups; a layer that feeds two others, or is called twice with different inputs, is in none."""
    feeds: dict[str, set[str]] = {}  # from a layer to the layers that it reaches
    sources: dict[str, list[dict[str, Tensor]]] = {}
    first: dict[str, _Call] = {}
    for call in calls:
        reached = _sources(call.given, labels)
        sources.setdefault(call.layer.module, []).append(reached)
        first.setdefault(call.layer.module, call)
        for label in reached:
            feeds.setdefault(label, set()).add(call.layer.module)
    order = {path: place for place, path in enumerate(first)}
    found = []
    for path, reaching in sources.items():
        names = set(reaching[0])
        if not names or any(set(one) != names for one in reaching) or not names <= first.keys():
            continue
        producers = [first[name] for name in sorted(names, key=order.__getitem__)]
        shared = any(call.layer.aliases for call in (first[path], *producers))
        if shared or any(feeds[name] != {path} for name in names):
            continue
        group = _group(block, first[path], producers, [reaching[0][call.layer.module] for call in producers])
        if group is not None:
            found.append(group)
    return found


def _sources(tensor: Tensor, labels: Mapping[int, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The labelled leaves that ``tensor`` is computed from, by label."""
    if id(tensor) in labels:
        return dict([labels[id(tensor)]])
    found: dict[str, Tensor] = {}
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in labels:
            found.setdefault(*labels[id(leaf)])
        todo += [following for following, _ in node.next_functions]
    return found


def _group(block: Block, consumer: _Call, producers: Sequence[_Call], leaves: Sequence[Tensor]) -> ChannelGroup | None:
    """The group of one consumer, if gradients confirm its units."""
    layer = consumer.layer
    width = units = layer.shape[1]
    if consumer.given.shape[-1] != width:
        return None
    probe = _Probe(consumer.given, leaves)
    kind: Kind = "feed-forward"
    if not (all(call.layer.shape[0] % width == 0 for call in producers) and probe.confirms_each(width)):
        kind, units = "attention", probe.head_width()
        if not (units > 0 and width % units == 0 and all(call.layer.shape[0] % units == 0 for call in producers)):
            return None
        if not probe.confirms_values(units):
            return None
    members = [Member(call.layer, True, torch.arange(call.layer.shape[0]) % units) for call in producers]
    members.append(Member(layer, False, torch.arange(width) % units))
    return ChannelGroup(layer.module, kind, block.name, layer.tower, layer.modality, units, tuple(members))


class _Probe:
    """Finds by gradients which producers' outputs some of a consumer's input channels depend on."""

    def __init__(self, given: Tensor, leaves: Sequence[Tensor]) -> None:
        self._given, self._leaves = given, leaves
        self._generator = torch.Generator().manual_seed(0)
        self._direction = torch.randn(given.shape, generator=self._generator, dtype=torch.float32).to(given)

    def reached(self, columns: Tensor) -> Tensor:
        """For each output of all producers, concatenated: whether one of ``columns`` depends on it."""
        direction = self._direction * columns.to(self._direction)
        found = torch.autograd.grad(
            self._given, self._leaves, direction, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([(gradient != 0).flatten(0, -2).any(0).cpu() for gradient in found])

    def confirms_each(self, width: int) -> bool:
        """Whether output i feeds exactly the column i modulo ``width``."""
        column = torch.arange(sum(leaf.shape[-1] for leaf in self._leaves)) % width
        chosen = self._half(width)
        for columns in (chosen, ~chosen):
            reached = self.reached(columns)
            if bool((reached & ~columns[column]).any()) or not bool(reached.any()):
                return False
        return True

    def head_width(self) -> int:
        """Channels of a head, if one column depends on one value and on its head's query and key; otherwise 0."""
        first = torch.zeros(self._given.shape[-1], dtype=torch.bool)
        first[0] = True
        width, remainder = divmod(int(self.reached(first).sum()) - 1, 2)
        return 0 if remainder else width

    def confirms_values(self, units: int) -> bool:
        """Whether values feed only the columns of their own unit; queries and keys feed all columns of a head."""
        unit = torch.cat([torch.arange(leaf.shape[-1]) % units for leaf in self._leaves])
        column = torch.arange(self._given.shape[-1]) % units
        chosen = self._half(units)
        inside, outside = self.reached(chosen[column]), self.reached(~chosen[column])
        values = inside != outside
        return bool(values.any()) and torch.equal(inside[values], chosen[unit[values]])

    def _half(self, units: int) -> Tensor:
        """A random half of some units, at least one."""
        chosen = torch.zeros(units, dtype=torch.bool)
        chosen[torch.randperm(units, generator=self._generator)[: max(1, units // 2)]] = True
        return chosen
