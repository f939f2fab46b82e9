"""Watches what the layers of a block receive, also weights that are multiplied without a call of their module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.model.packed_attention import Seen, attention_inputs_seen, packed_around
from ecoflap.model.parts import Layer
from ecoflap.model.slices import Product, experts_in_turn, products_seen, slice_name
from ecoflap.model.trace import linear_weight

Feed = Callable[[Layer, Tensor], None]


@contextmanager
def inputs_watched(model: nn.Module, layers: Iterable[Layer], feed: Feed) -> Iterator[None]:
    """Inside, ``feed`` is called with each layer and its input, just before the layer computes."""
    functional: dict[int, Layer] = {}
    slices: dict[str, Layer] = {}
    owners: dict[str, dict[str, None]] = {}
    attention: dict[str, dict[str, Seen]] = {}
    with ExitStack() as hooks:
        for layer in layers:
            if (layer.stacked or layer.uncalled) and (path := packed_around(model, layer.name)) is not None:
                attention.setdefault(path, {})[layer.name.removeprefix(f"{path}.")] = partial(feed, layer)
            elif layer.stacked:
                slices[layer.name] = layer
                owners.setdefault(layer.module, {})[layer.parameter.rpartition(".")[2]] = None
            elif layer.uncalled:
                functional[id(model.get_parameter(layer.name))] = layer
            else:
                module = model.get_submodule(layer.module)
                hooks.callback(module.register_forward_pre_hook(_hook(layer, feed)).remove)
        hooks.enter_context(attention_inputs_seen(model, attention))
        if slices:
            hooks.enter_context(experts_in_turn(model))
            hooks.enter_context(products_seen(model, owners, partial(_feed_slices, slices, feed)))
        if functional:
            hooks.enter_context(_FunctionalInputs(functional, feed))
        yield


def _feed_slices(slices: Mapping[str, Layer], feed: Feed, path: str, leaf: str, product: Product) -> None:
    for number, x in product.inputs():
        layer = slices.get(slice_name(f"{path}.{leaf}", number, product.of))
        if layer is not None:
            feed(layer, x)


def _hook(layer: Layer, feed: Feed) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        feed(layer, args[0])

    return hook


class _FunctionalInputs(TorchFunctionMode):
    """Sees what is multiplied by weights whose module is never called."""

    def __init__(self, layers: Mapping[int, Layer], feed: Feed) -> None:
        super().__init__()
        self._layers, self._feed = layers, feed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = self._layers.get(id(linear_weight(func, args, kwargs)))
        if layer is not None:
            self._feed(layer, args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))
