"""Removes zero channels from a model, if its configuration can express the new sizes.

Which entry of a configuration sets the width of which matrices is found by trial: an entry that equals a group's width
is changed, the model is built again on the meta device, and the changed shapes are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.channels import ChannelGroup
from ecoflap.model.files import quiet

_TOLERANCE = 1e-4  # relative difference of outputs in float32 that may come from rounding
Kept = Mapping[str, Tensor]


@dataclass(frozen=True)
class Narrowed:
    """A smaller model.

    Attributes:
        model: of the same class, with a new configuration.
        entries: of the configuration, such as ``text_config.d_ff``, with old and new size.
    """

    model: nn.Module
    entries: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _Entry:
    """An entry of a configuration that sets the width of some groups."""

    path: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)


def narrow(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, outputs: Callable[[nn.Module], Tensor]
) -> Narrowed | None:
    """A model without zero channels and with the same outputs; None if the configuration can't express it.

    All groups that one entry sets get the width of the widest; the others keep some zero channels. An entry is left
    unchanged if the outputs would differ: rotary positions, for example, depend on a channel's index, and a scale of
    1/√width changes with the width.

    Args:
        model: with zeros in all weights and biases of the units that are removed.
        kept: which units of each group stay.
        outputs: computes the outputs that must stay the same, such as the logits of one batch.
    """
    if not hasattr(model, "config"):
        return None
    expected = outputs(model)
    found, sizes = None, dict[_Entry, int]()
    for entry in _entries(model, groups):
        width = max(int(kept[group.name].sum()) for group in entry.groups)
        if width == entry.groups[0].width:
            continue
        smaller = _made(model, {**sizes, entry: width}, kept)
        if smaller is not None and _same(expected, outputs(smaller)):
            found, sizes[entry] = smaller, width
    if found is None:
        return None
    return Narrowed(found, {entry.name: (entry.groups[0].width, width) for entry, width in sizes.items()})


def _same(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max())


def _entries(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[_Entry]:
    """Entries that set the width of all members of some groups, and no other shape."""
    widths = {group.width for group in groups}
    shapes = _shapes(model)
    for path, value in _numbers(_config(model).to_dict()):
        if value not in widths or value < 2:
            continue
        other = _empty(model, {path: value - 1})
        if other is None:
            continue
        changed = {name for name, shape in _shapes(other).items() if shapes.get(name) != shape}
        mine = tuple(g for g in groups if g.width == value and all(m.layer.name in changed for m in g.members))
        owned = {name for group in mine for member in group.members for name in (member.layer.name, member.bias)}
        if mine and changed <= owned:
            yield _Entry(path, mine)


def _config(model: nn.Module) -> Any:
    return model.config


def _numbers(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, str(name)))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, str(name)), value


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _configured(model: nn.Module, changes: Mapping[tuple[str, ...], int]) -> Any:
    """The configuration with some entries changed; None if it refuses them."""
    config = _config(model)
    content = copy.deepcopy(config.to_dict())
    try:
        for path, value in changes.items():
            _at(content, path[:-1])[path[-1]] = value
        found = type(config).from_dict(content)
        if any(_at(found.to_dict(), path) != value for path, value in changes.items()):
            return None
    except Exception:  # each family raises its own errors, for example if the heads do not divide a width
        return None
    found._attn_implementation = config._attn_implementation
    return found


def _built(model: nn.Module, config: Any) -> nn.Module | None:
    """A model of the same class; None if the class refuses the configuration."""
    kind: Any = type(model)
    try:
        with quiet():
            found: nn.Module = kind(config)
        return found
    except Exception:  # as in _configured
        return None


def _empty(model: nn.Module, changes: Mapping[tuple[str, ...], int]) -> nn.Module | None:
    """The model on the meta device with some entries of its configuration changed; None if it refuses them."""
    config = _configured(model, changes)
    if config is None:
        return None
    with torch.device("meta"):
        return _built(model, config)


def _at(content: Any, path: Sequence[str]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _made(model: nn.Module, sizes: Mapping[_Entry, int], kept: Kept) -> nn.Module | None:
    """The smaller model with the weights of the units that stay."""
    changed = _configured(model, {entry.path: width for entry, width in sizes.items()})
    if changed is None:
        return None
    cuts: dict[str, tuple[int, Tensor]] = {}
    for entry, width in sizes.items():
        for group in entry.groups:
            stays = _filled(kept[group.name], width)
            for member in group.members:
                channels = stays[member.units].nonzero().flatten()
                cuts[member.layer.name] = member.axis, channels
                if member.outputs:
                    cuts[member.bias] = 0, channels
    found: Any = _built(model, changed)
    if found is None:
        return None
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, (axis, channels) in cuts.items():
        if name in state:
            state[name] = state[name].index_select(axis, channels.to(state[name].device)).contiguous()
    try:
        found.load_state_dict(state, assign=True)
    except RuntimeError:  # a shape that follows from another entry
        return None
    found.tie_weights()
    if hasattr(model, "generation_config"):
        found.generation_config = model.generation_config
    found = found.to(next(model.parameters()).device).train(model.training)
    return found  # type: ignore[no-any-return]


def _filled(stays: Tensor, width: int) -> Tensor:
    """The units that stay, and the first of the others to fill ``width``."""
    filled = stays.clone()
    filled[(~stays).nonzero().flatten()[: width - int(stays.sum())]] = True
    return filled
