"""Saves and restores the dictionaries and key-value caches through which blocks pass values beside their outputs.

Gemma 3n and Gemma 4 compute keys and values in some blocks and read them in later ones, through a dictionary that the
parent passes to all; pi0 passes a filled key-value cache from one tower to the next. A block that is skipped or run
again must leave these carriers as a single call would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Carried:
    """The contents of a carrier as plain data, from which it can be built again.

    It is a node of torch's pytrees, so that code which stores, moves or compares trees of arguments handles it, too.
    """

    kind: type
    contents: dict[Any, Any]


Left = dict[int | str, Carried]
"""The contents of a call's carriers, by their position or name among its arguments."""


def _flatten(node: Carried) -> tuple[list[Any], Any]:
    return list(node.contents.values()), (node.kind, tuple(node.contents))


def _unflatten(values: Any, context: Any) -> Carried:
    return Carried(context[0], dict(zip(context[1], values, strict=True)))


def _flatten_with_keys(node: Carried) -> tuple[list[Any], Any]:
    values, context = _flatten(node)
    return [(pytree.MappingKey(key), one) for key, one in zip(node.contents, values, strict=True)], context


pytree.register_pytree_node(Carried, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)  # our own class


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers, or a layer of one; none exists before that module is imported."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None:
        return False
    kinds = [getattr(library, name, None) for name in ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")]
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def is_carrier(value: Any) -> bool:
    """Whether a block may write into this argument: a mapping (no model output), or a cache."""
    return (
        type(value) is dict or _is_cache(value) or (isinstance(value, MutableMapping) and not isinstance(value, dict))
    )


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if _is_cache(value):
        return Carried(type(value), {name: _packed(one) for name, one in vars(value).items()})
    if is_carrier(value):
        return Carried(type(value), {key: _packed(one) for key, one in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_packed(one) for one in value)
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, Carried):
        return _filled(object.__new__(value.kind) if _by_attributes(value) else value.kind(), value)
    if type(value) in (list, tuple):
        return type(value)(_unpacked(one) for one in value)
    return value


def _by_attributes(node: Carried) -> bool:
    return not issubclass(node.kind, Mapping)


def _filled(carrier: Any, node: Carried) -> Any:
    contents = {key: _unpacked(one) for key, one in node.contents.items()}
    if _by_attributes(node):
        vars(carrier).clear()
        vars(carrier).update(contents)
    else:
        carrier.clear()
        carrier.update(contents)
    return carrier


def _arguments(of_each: Callable[[Any], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    return tuple(of_each(one) for one in args), {name: of_each(one) for name, one in kwargs.items()}


def packed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments with the current contents of each carrier instead of the carrier.

    Tensors are not copied, so an in-place change of one (in a static cache) is not noticed.
    """
    return _arguments(_packed, args, kwargs)


def unpacked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Arguments for one call, with a new carrier for each that :func:`packed` replaced."""
    return _arguments(_unpacked, args, kwargs)


def contents(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Left:
    """The current contents of each carrier among the arguments."""
    return {place: _packed(one) for place, one in _carriers(args, kwargs)}


def left(before: Left, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Left:
    """The contents of the carriers that a call has written to.

    Args:
        before: :func:`contents` before the call.
    """
    return {place: node for place, node in contents(args, kwargs).items() if not _same(before[place], node)}


def restore(held: Left, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Set the carriers among the arguments to the contents that :func:`left` returned for another call."""
    if held:
        for place, carrier in _carriers(args, kwargs):
            if place in held:
                _filled(carrier, held[place])


def _same(one: Carried, other: Carried) -> bool:
    """Whether both hold the same objects in the same places."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    return bool(spec == other_spec) and all(a is b for a, b in zip(leaves, others, strict=True))


def _carriers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return ((place, one) for place, one in places if is_carrier(one))
